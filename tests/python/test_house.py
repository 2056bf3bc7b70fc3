"""What `scripts/house` measures of the Rust sources stays within its bounds; and its eyes are good."""

from pathlib import Path

import pytest
from house_lib.circles import circles
from house_lib.measures import Measure, measure
from house_lib.source import Source


def source(path: str, text: str) -> Source:
    return Source(Path(path), text)


@pytest.fixture(scope="module")
def measures() -> dict[str, Measure]:
    return {one.name: one for one in measure()}


def test_every_measure_is_within_its_bound(measures: dict[str, Measure]) -> None:
    over = [f"{one.name}: {one.value:g}, at most {one.bound:g}: {one.details}" for one in measures.values() if one.over]
    assert not over, "\n".join(over)
    assert measures["files"].value > 200


def test_comments_literals_and_test_modules_say_nothing() -> None:
    code = source(
        "engine/a.rs",
        '// struct A;\nconst S: &str = "struct B;"; const R: &str = r#"struct C;"#;\n'
        "/* struct D; */ const Q: char = '\"';\n"
        "#[cfg(test)]\nmod tests {\n    struct E;\n}\npub struct F;\n",
    )
    assert code.types == ["F"]
    assert code.code.count("\n") == code.text.count("\n")


def test_functions_are_measured_to_their_closing_brace() -> None:
    text = "fn a() {\n    if x {\n    }\n}\n\ntrait T {\n    fn declared(&self);\n    fn given(&self) {}\n}\n"
    assert source("engine/a.rs", text).functions == [("a", 4), ("given", 1)]


@pytest.mark.parametrize(
    ("texts", "found"),
    [
        (["use super::b::B;", "use crate::a::A;"], [["engine::a", "engine::b"]]),
        (
            ["use crate::{b::B, c};", "use super::c::C;", "use super::{a, x};"],
            [["engine::a", "engine::b", "engine::c"]],
        ),
        (["use super::b::B;", "fn f() {}"], []),
        (["// use super::b::B;", "use crate::a::A;"], []),
    ],
)
def test_circles_are_found(texts: list[str], found: list[list[str]]) -> None:
    files = [source(f"engine/{name}.rs", text) for name, text in zip("abc", texts, strict=False)]
    assert circles(files) == found


def test_a_folder_and_its_files_are_one_unit() -> None:
    files = [
        source("engine/pool/mod.rs", "pub mod open;\nuse self::open::open;"),
        source("engine/pool/open.rs", "use super::Pool;"),
    ]
    assert circles(files) == []
