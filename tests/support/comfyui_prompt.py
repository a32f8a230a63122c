"""Convert a workflow, as ComfyUI's page saves it, to the prompt that the page would queue."""

from typing import Any

PAGE_ONLY = ("MarkdownNote",)
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")


def widget_inputs(info: dict[str, Any]) -> list[tuple[str, bool]]:
    """(name, whether the page has its control-after-generate widget behind it) of a node's widgets, in order. info:
    the node's entry of /object_info."""
    found = []
    for group in ("required", "optional"):
        for name, (kind, *options) in info["input"].get(group, {}).items():
            if isinstance(kind, list) or kind in WIDGETS:
                found.append((name, bool(options and options[0].get("control_after_generate"))))
    return found


def prompt_of(workflow: dict[str, Any], info: dict[str, Any]) -> dict[str, Any]:
    """Node number → class_type and inputs: values of widgets, and links as [node, output]."""
    links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in PAGE_ONLY:
            continue
        values = iter(node["widgets_values"])
        inputs: dict[str, Any] = {}
        for name, controlled in widget_inputs(info[node["type"]]):
            inputs[name] = next(values)
            if controlled:
                next(values)
        for given in node["inputs"]:
            if given["link"] is not None:
                inputs[given["name"]] = links[given["link"]]
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt
