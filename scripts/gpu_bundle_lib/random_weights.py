"""A vLLM plugin: `load_format="dummy"` gives weights of a usual scale, the same at every start.

vLLM's own are so small, norms included, that every token is equally likely: equal answers prove nothing then.
"""


def register() -> None:
    """Replace the one function that draws a tensor; vLLM calls this in the front end, EngineCore and every worker."""
    import torch
    from vllm.model_executor.model_loader import dummy_loader

    drawn = 0

    def draw(tensor: torch.Tensor, *_: object, **__: object) -> None:
        nonlocal drawn
        if not tensor.is_floating_point():
            return
        if tensor.dim() < 2:
            tensor.data.fill_(1.0)
            return
        drawn += 1
        generator = torch.Generator(device=tensor.device).manual_seed(drawn)
        values = torch.randn(tensor.shape, generator=generator, device=tensor.device, dtype=torch.float32)
        tensor.data.copy_(values * (1.5 * tensor.shape[-1] ** -0.5))

    dummy_loader.initialize_single_dummy_weight = draw
