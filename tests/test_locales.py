"""Every word of the nodes exists in English and Chinese, and nothing is translated that does not exist."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).absolute().parent.parent
LANGUAGES = ("en", "zh")


def node_defs(language: str) -> dict:
    return json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))


def words(schema) -> dict:
    """What a locale file must hold for one node, in the words of its Python schema."""
    return {
        "display_name": schema.display_name,
        "description": schema.description,
        "inputs": {
            entry.id: {"name": entry.display_name or entry.id, "tooltip": entry.tooltip} for entry in schema.inputs
        },
        "outputs": {
            str(index): {"name": entry.display_name or entry.io_type, "tooltip": entry.tooltip}
            for index, entry in enumerate(schema.outputs)
        },
    }


def leaves(tree, path=()) -> dict[tuple, str]:
    if not isinstance(tree, dict):
        return {path: tree}
    return {key: value for name, child in tree.items() for key, value in leaves(child, (*path, name)).items()}


def test_english_is_what_the_nodes_say(pack):
    assert node_defs("en") == {node_id: words(node.GET_SCHEMA()) for node_id, node in pack.nodes.items()}


def test_chinese_has_the_same_entries():
    english, chinese = leaves(node_defs("en")), leaves(node_defs("zh"))
    assert set(chinese) == set(english)
    untranslated = [
        path for path, text in chinese.items() if not any("\u4e00" <= letter <= "\u9fff" for letter in text)
    ]
    assert untranslated == []


def test_every_category_has_a_chinese_name(pack):
    main = json.loads((ROOT / "locales" / "zh" / "main.json").read_text(encoding="utf-8"))
    used = {part for node in pack.nodes.values() for part in node.GET_SCHEMA().category.split("/")}
    assert set(main["nodeCategories"]) == used


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_node_has_a_help_page_that_names_its_inputs(pack, language):
    for node_id in pack.nodes:
        # The English page is the one that the interface falls back to.
        name = f"{node_id}.md" if language == "en" else f"{node_id}/{language}.md"
        page = (ROOT / "web" / "docs" / name).read_text(encoding="utf-8")
        entry = node_defs(language)[node_id]
        assert page.startswith(f"# {entry['display_name']}\n")
        if len(entry["inputs"]) > 1:
            assert [text["name"] for text in entry["inputs"].values() if f"- **{text['name']}**" not in page] == []


@pytest.mark.parametrize("name", ["performance", "caches"])
def test_pages_of_figures_have_the_same_ones(name):
    names = (f"{name}.md", f"{name}/zh.md")
    pages = [(ROOT / "web" / "docs" / name).read_text(encoding="utf-8") for name in names]
    english, chinese = (
        [re.findall(r"\d[\d.,]*", line) for line in page.splitlines() if line.startswith("|")] for page in pages
    )
    assert chinese == english
