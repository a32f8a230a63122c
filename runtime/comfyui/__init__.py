"""The nodes for ComfyUI: a session behind ComfyUI's V3 node interface.

    installing   installs the folder in `custom_nodes/`: `scail2-rt comfyui`
    extension    the entry point for ComfyUI: the list of nodes
    *_node       one node per file
    frames       converts the graph's tensors to frames of a clip, and frames to such a tensor
    mask_inputs  converts the graph's masks: colour-coded images, mattes, SAM 3 tracks
    sessions     the session that stays open, managed as one of ComfyUI's models
    host         all calls of ComfyUI's own functions

`installing` imports neither torch nor ComfyUI. Files that import `comfy_api` work only inside ComfyUI."""
