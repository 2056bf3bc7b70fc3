"""What vLLM 0.32's CPU build lacks for models that it runs otherwise. Only engines in the test's own process see it."""

from typing import Any


def mamba2_prefill_checkpoints() -> None:
    """Mamba-2's state inside a prefill, which a GPU's kernel stores while it scans.

    vLLM plans for it on CPUs as well, where its scan returns the last state alone and its kernel that stores a state
    needs Triton. Here the scan is called chunk by chunk, and the state is stored by torch.
    """
    import torch
    from vllm.model_executor.layers.mamba import mamba_mixer2
    from vllm.model_executor.layers.mamba.ops import ssd_combined

    whole = ssd_combined._mamba_chunk_scan_combined_fwd
    if getattr(whole, "by_chunks", False):
        return

    # As vLLM calls it.
    def scan(  # noqa: PLR0917
        x: Any,
        dt: Any,
        a: Any,
        b: Any,
        c: Any,
        chunk_size: int,
        out: Any,
        *,
        return_intermediate_states: bool = False,
        initial_states: Any = None,
        cu_seqlens: Any = None,
        cu_chunk_seqlens: Any = None,
        last_chunk_indices: Any = None,
        **more: Any,
    ) -> Any:
        if not return_intermediate_states:
            known = {"initial_states": initial_states, "cu_seqlens": cu_seqlens}
            chunks = {"cu_chunk_seqlens": cu_chunk_seqlens, "last_chunk_indices": last_chunk_indices}
            return whole(x, dt, a, b, c, chunk_size, out, return_intermediate_states=False, **known, **chunks, **more)
        more.pop("seq_idx", None)
        ends = cu_chunk_seqlens.tolist()
        states: list[Any] = []
        for sequence, final in enumerate(last_chunk_indices.tolist()):
            state = None if initial_states is None else initial_states[sequence : sequence + 1]
            for chunk in range(len(states), final + 1):
                part = slice(ends[chunk], ends[chunk + 1])
                length = torch.tensor([0, part.stop - part.start], dtype=torch.int32)
                more |= {"initial_states": state, "cu_seqlens": length}
                state = whole(x[part], dt[part], a, b[part], c[part], chunk_size, out[part], **more)
                states.append(state)
        return torch.cat(states)

    def store(  # noqa: PLR0917
        checkpoint: Any,
        chunk_indices: Any,
        x: Any,
        conv_state: Any,
        chunk_states: Any,
        ssm_state: Any,
        query_start_loc: Any,
        *,
        state_len: int,
    ) -> None:
        offsets, blocks = checkpoint.checkpoint_offsets.tolist(), checkpoint.state_indices.tolist()
        # Padding may follow.
        rows = zip(offsets, blocks, chunk_indices.tolist(), query_start_loc.tolist(), strict=False)
        for offset, block, chunk, start in rows:
            if offset > 0:
                conv_state[block, :, :state_len] = x[:, start + offset - state_len : start + offset]
                ssm_state[block] = chunk_states[chunk]

    scan.by_chunks = True  # type: ignore[attr-defined]
    ssd_combined._mamba_chunk_scan_combined_fwd = scan
    mamba_mixer2.store_prefill_checkpoint = store
