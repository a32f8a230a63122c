"""The nodes for ComfyUI: a session behind its V3 interface.

    installing   the folder in `custom_nodes/`: `scail2-rt comfyui`
    extension    what ComfyUI asks for: the list of nodes
    *_node       one node a file
    frames       tensors of the graph as frames of a clip, and frames as such a tensor
    mask_inputs  what a graph calls a mask: coloured pictures, mattes, SAM 3 tracks
    sessions     the session that stays warm, as one of ComfyUI's models
    host         everything that is asked of ComfyUI itself

`installing` imports neither torch nor ComfyUI. Files that import `comfy_api` can be imported inside ComfyUI only."""
