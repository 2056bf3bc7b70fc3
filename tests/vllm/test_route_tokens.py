"""Token ids and chat texts made in the router, beside vLLM's and transformers' own."""

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.vllm.places import real_model, temporary_pool_dir
from tests.vllm.router import Router, open_router
from tests.vllm.server import Server, open_server
from tests.vllm.sizes import kv_mib

# ruff: noqa: RUF001 (characters that look alike are what a tokenizer must tell apart)
ALPHABETS = [
    "the quick brown fox jumps over a lazy dog and then some more words",
    "Zażółć gęślą jaźń ÄÖÜß éèêë ñ ç İstanbul ﬁ e\u0301 a\u030a",
    "東京タワー 北京 한국어 ไทย हिन्दी עברית العربية",
    "🗼👩\u200d👩\u200d👧🏽🇵🇱 ∑∫√ → ≠ \u200b\u00a0\u3000\u2028",
    "def f(x): return x**2 + 1e-5 # it's 100%; don't, we'll, I'm\n\n\n\t\t  {}[]<>|\\/\"'`~",
    "0 12 345 6789 3.14159 1,000,000 ２３ ½",
    "<|im_start|> <|im_end|> <|endoftext|> <s> </s> <tool_call> [INST]",
]


def text(random: Random, pieces: int) -> str:
    """Pieces of all alphabets with spaces of all kinds between them."""
    spaces = [" ", "", "  ", "\n", "\n\n", "\t", " \n "]

    def piece() -> str:
        alphabet = random.choice(ALPHABETS)
        start = random.randrange(len(alphabet))
        return alphabet[start : start + random.randrange(1, 20)]

    return "".join(piece() + random.choice(spaces) for _ in range(pieces))


def tool(random: Random, number: int) -> dict[str, Any]:
    """A tool with a schema of some depth."""
    fields = {
        f"field_{at}": {"type": random.choice(["string", "number"]), "description": text(random, 2)} for at in range(3)
    }
    function: dict[str, Any] = {
        "name": f"tool_{number}",
        "parameters": {"type": "object", "properties": fields, "required": ["field_0"]},
    }
    if random.random() < 0.7:
        function["description"] = text(random, 3)
    if random.random() < 0.3:
        function["strict"] = True
    return {"type": "function", "function": function}


def chat(random: Random) -> dict[str, Any]:
    """A conversation: system, turns, parts, tool calls and their results, tools."""
    messages: list[dict[str, Any]] = []
    if random.random() < 0.5:
        messages.append({"role": "system", "content": text(random, 3)})
    for turn in range(random.randrange(1, 5)):
        content: Any = text(random, random.randrange(1, 12))
        if random.random() < 0.2:
            content = [{"type": "text", "text": content}, {"type": "text", "text": text(random, 2)}]
        messages.append({"role": "user", "content": content})
        if random.random() < 0.3:
            arguments = json.dumps({"b": turn, "a": text(random, 1), "c": 1.5})
            call = {"id": f"call_{turn}", "type": "function", "function": {"name": "tool_0", "arguments": arguments}}
            messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
            messages.append({"role": "tool", "tool_call_id": f"call_{turn}", "content": text(random, 2)})
        messages.append({"role": "assistant", "content": text(random, 3)})
    messages.append({"role": "user", "content": text(random, 4)})
    body: dict[str, Any] = {"messages": messages}
    if random.random() < 0.4:
        body["tools"] = [tool(random, number) for number in range(random.randrange(1, 3))]
    return body


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A real engine; only its tokenizer matters."""
    with (
        temporary_pool_dir() as pool_dir,
        open_server(tmp_path_factory.mktemp("engine"), pool_dir, cellar={"dram_size": kv_mib(64)}) as server,
    ):
        yield server


@pytest.fixture(scope="module")
def router(engine: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    """A router with the engine's tokenizer."""
    flags = ["--engine", engine.url, "--tokenizer", str(real_model())]
    with open_router(tmp_path_factory.mktemp("router"), *flags) as running:
        running.wait_engines(1)
        yield running


@pytest.mark.parametrize("kind", ["completion", "chat"])
def test_ids_are_vllms_own(engine: Server, router: Router, kind: str) -> None:
    """A thousand prompts, five hundred of each kind: every one has vLLM's ids, made in the router."""
    random = Random(2026 if kind == "chat" else 11)
    for number in range(500):
        body = chat(random) if kind == "chat" else {"prompt": text(random, random.choice([1, 5, 40, 400]))}
        theirs = engine.client.post("/tokenize", json={"model": "model", **body})
        ours = router.admin.post(f"/debug/tokens/{kind}", json={"model": "model", **body}).json()
        assert theirs.status_code == 200, theirs.text
        assert ours.get("from") == "local", (number, ours, body)
        assert ours["ids"] == theirs.json()["tokens"], (number, body)


def test_prompts_that_repeat_keep_their_ids(engine: Server, router: Router) -> None:
    """Remembered pieces join to the same ids: prompts that share long beginnings, asked twice."""
    random = Random(5)
    base = " ".join(random.choice(ALPHABETS[0].split()) for _ in range(4000)) + text(random, 200)
    for cut in [0, 1000, 1023, 1024, 1025, 5000, 12_345, len(base)]:
        body = {"prompt": base[:cut] + text(random, 3), "model": "model"}
        theirs = engine.client.post("/tokenize", json=body).json()["tokens"]
        for _ in range(2):
            assert router.admin.post("/debug/tokens/completion", json=body).json()["ids"] == theirs


def real_texts() -> list[str]:
    """What people wrote: this project's pages, a licence, and programs of the standard library."""
    root = Path(__file__).resolve().parents[2]
    pages = [root / name for name in ("README.md", "ARCHITECTURE.md", "CHANGELOG.md", "LICENSE")]
    library = Path(json.__file__).parents[1]
    programs = [library / f"{name}.py" for name in ("argparse", "difflib", "textwrap", "this", "turtle", "typing")]
    return [path.read_text(encoding="utf-8") for path in [*pages, *programs]]


def test_real_texts_have_vllms_ids(engine: Server, router: Router) -> None:
    """Whole pages and programs, cut anywhere, their words remembered from one to the next."""
    random = Random(8)
    for text in real_texts():
        for _ in range(4):
            start = random.randrange(max(1, len(text) - 2000))
            body = {"prompt": text[start : start + random.choice([500, 5000, 60_000])], "model": "model"}
            theirs = engine.client.post("/tokenize", json=body).json()["tokens"]
            ours = router.admin.post("/debug/tokens/completion", json=body).json()
            assert ours["from"] == "local" and ours["ids"] == theirs, body["prompt"][:80]


def test_the_self_check_says_which_ids_are_used(router: Router) -> None:
    """It has run by now, and found no difference."""
    assert "made here" in router.log.read_text()


def templates() -> dict[str, str]:
    """Every chat template that vLLM and the model bring, and small ones in the styles of well-known families."""
    import vllm

    found = {"smollm2": (real_model() / "chat_template.jinja").read_text()}
    folder = Path(vllm.__file__).parent / "transformers_utils" / "chat_templates"
    for path in sorted(folder.glob("*.jinja")):
        found[path.stem] = path.read_text()
    for path in sorted((Path(__file__).parent / "templates").glob("*.jinja")):
        found[path.stem] = path.read_text()
    return found


def test_texts_are_transformers_own(tmp_path: Path) -> None:
    """Every template renders as transformers does, or is said to be inexact; none differs."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real_model())
    sources = templates()
    flags: list[str] = []
    for name, source in sources.items():
        folder = tmp_path / name
        folder.mkdir()
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (folder / file).symlink_to(real_model() / file)
        (folder / "chat_template.jinja").write_text(source)
        flags += ["--tokenizer", f"{name}={folder}"]
    random = Random(77)
    bodies = [chat(random) for _ in range(60)]
    exact: dict[str, int] = dict.fromkeys(sources, 0)
    with open_router(tmp_path, "--engine", "http://127.0.0.1:9", *flags) as running:
        for name, source in sources.items():
            for body in bodies:
                ours = running.admin.post("/debug/tokens/chat", json={"model": name, **body}).json()
                if ours["text"] is None:
                    continue
                messages, tools = as_vllm_hands_them(body)
                theirs = tokenizer.apply_chat_template(
                    messages, tools=tools, chat_template=source, tokenize=False, add_generation_prompt=True
                )
                assert ours["text"] == theirs, (name, body)
                exact[name] += 1
    print("rendered exactly, of", len(bodies), exact)
    assert exact["smollm2"] == len(bodies)
    assert sum(count > 0 for count in exact.values()) >= len(sources) * 3 // 4, exact


def as_vllm_hands_them(body: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """Messages and tools as vLLM gives them to a template that takes texts."""
    messages = []
    for message in body["messages"]:
        made = {key: value for key, value in message.items() if key in {"role", "content", "tool_call_id"}}
        content = message["content"]
        made["content"] = "\n".join(part["text"] for part in content) if isinstance(content, list) else content or ""
        if "tool_calls" in message:
            made["tool_calls"] = [
                {**call, "function": {**call["function"], "arguments": json.loads(call["function"]["arguments"])}}
                for call in message["tool_calls"]
            ]
        messages.append(made)
    tools = body.get("tools")
    if tools is not None:
        tools = [
            {
                "type": "function",
                "function": {
                    "name": it["function"]["name"],
                    "description": it["function"].get("description"),
                    "parameters": it["function"].get("parameters"),
                    **({"strict": True} if it["function"].get("strict") else {}),
                },
            }
            for it in tools
        ]
    return messages, tools
