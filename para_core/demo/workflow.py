"""Turns a workflow as the interface saves it into the prompt that the server runs."""

from __future__ import annotations

NOTES = ("Note", "MarkdownNote")
WIDGET_TYPES = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
MUTED, BYPASSED = 2, 4


def to_api(workflow: dict, object_info: dict) -> dict[str, dict]:
    """The API prompt of a workflow in the interface's format; one that is an API prompt already comes back as it is.

    object_info: what the server answers at /object_info. Notes are left out, bypassed nodes are wired through.
    Raises ValueError for a node type that the server does not know, and for what this small converter does not do:
    subgraphs, reroutes, and muted nodes.
    """
    if "nodes" not in workflow:
        return workflow
    nodes = {node["id"]: node for node in workflow["nodes"] if node["type"] not in NOTES}
    for node in nodes.values():
        if node["type"] not in object_info:
            raise ValueError(
                f'the workflow has a node "{node["type"]}" that this ComfyUI does not know; '
                "install the pack that brings it, or replace the node"
            )
        if node.get("mode", 0) == MUTED:
            raise ValueError(f'node {node["id"]} "{node["type"]}" is muted; bypass or remove it')
    links = {link[0]: (link[1], link[2]) for link in workflow["links"]}
    return {
        str(node["id"]): {
            "class_type": node["type"],
            "inputs": widget_inputs(node, object_info[node["type"]]) | _linked_inputs(node, nodes, links),
        }
        for node in nodes.values()
        if node.get("mode", 0) != BYPASSED
    }


def widget_inputs(node: dict, info: dict) -> dict[str, object]:
    """The widget values of one node by input name; `info` is the node's entry of /object_info.

    Raises ValueError when the node was saved with another number of widgets.
    """
    values = list(node.get("widgets_values") or [])
    inputs: dict[str, object] = {}
    for name, options in _widgets(info):
        if not values:
            raise ValueError(f'node {node["id"]} "{node["type"]}" has no value for "{name}"; save the workflow anew')
        inputs[name] = values.pop(0)
        # The interface puts "fixed", "randomize", ... behind a seed, a widget that the server never sees.
        if options.get("control_after_generate") and values:
            values.pop(0)
    if values:
        raise ValueError(f'node {node["id"]} "{node["type"]}" has more values than inputs: {values}')
    return inputs


def _widgets(info: dict) -> list[tuple[str, dict]]:
    found = []
    for kind in ("required", "optional"):
        for name in info["input_order"].get(kind, []):
            type_, options = (*info["input"][kind][name], {})[:2]
            if (isinstance(type_, list) or type_ in WIDGET_TYPES) and not options.get("forceInput"):
                found.append((name, options))
    return found


def _linked_inputs(node: dict, nodes: dict, links: dict) -> dict[str, list]:
    sources = {slot["name"]: _source(slot, nodes, links) for slot in node.get("inputs", [])}
    return {name: [str(source[0]), source[1]] for name, source in sources.items() if source is not None}


def _source(slot: dict, nodes: dict, links: dict) -> tuple[int, int] | None:
    """Follow a link upstream; a bypassed node hands on its first input of the type it would have put out."""
    while slot is not None and slot.get("link") is not None:
        origin, output = links[slot["link"]]
        node = nodes[origin]
        if node.get("mode", 0) != BYPASSED:
            return origin, output
        type_ = node["outputs"][output]["type"]
        slot = next((entry for entry in node["inputs"] if entry["type"] == type_), None)
    return None
