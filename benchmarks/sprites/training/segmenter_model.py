"""The small SAM 2: the classes of `transformers` with 3.3 million parameters, and a batched forward pass.

`Sam2VideoModel.forward` processes one clip and one figure at a time. Here a batch of clips with one figure each goes
through the model's methods: vision features of all frames at once, then per frame the memory attention, the mask
decoder and the memory encoder. A test compares both forms.

Differences from the published configuration: features at 1/2, 1/4 and 1/8 of the picture, which is 256 pixels wide (a
drawn clip is 128 wide, so masks have the clip's resolution); one mask per prompt instead of the best of three; no
temporal encoding of object pointers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

IMAGE = 256
WIDTH = 128  # channels of decoder and memory attention
MEMORY = 64  # channels of the memory, required by the memory attention of `transformers`
ATTENTION_HEADS = 32_768  # largest batch size times heads of one attention call
BOX, POINT, NO_POINT = (2, 3), 1, -1  # labels of a prompt's points


def segmenter_config() -> Any:
    """The `Sam2VideoConfig`."""
    from transformers import Sam2VideoConfig
    from transformers.models.sam2_video import Sam2VideoMaskDecoderConfig, Sam2VideoPromptEncoderConfig

    sides = [IMAGE // 2, IMAGE // 4, IMAGE // 8]
    backbone = {
        "hidden_size": 32, "image_size": [IMAGE, IMAGE], "patch_kernel_size": [5, 5], "patch_stride": [2, 2],
        "patch_padding": [2, 2], "blocks_per_stage": [1, 1, 3, 1], "embed_dim_per_stage": [32, 64, 128, 256],
        "num_attention_heads_per_stage": [1, 2, 4, 8], "window_size_per_stage": [8, 8, 8, 8],
        "global_attention_blocks": [3], "model_type": "sam2_hiera_det_model",
    }  # fmt: skip
    vision = {
        "backbone_config": backbone, "backbone_channel_list": [256, 128, 64, 32],
        "backbone_feature_sizes": [[side, side] for side in sides], "fpn_hidden_size": WIDTH,
        "model_type": "sam2_vision_model",
    }  # fmt: skip
    decoder = Sam2VideoMaskDecoderConfig(
        hidden_size=WIDTH,
        mlp_dim=512,
        num_attention_heads=4,
        iou_head_hidden_dim=WIDTH,
        dynamic_multimask_via_stability=False,
    )
    return Sam2VideoConfig(
        vision_config=vision,
        prompt_encoder_config=Sam2VideoPromptEncoderConfig(hidden_size=WIDTH, image_size=IMAGE, patch_size=8),
        mask_decoder_config=decoder,
        image_size=IMAGE,
        num_maskmem=4,
        max_object_pointers_in_encoder=8,
        multimask_output_in_sam=False,
        enable_temporal_pos_encoding_for_object_pointers=False,
        memory_attention_hidden_size=WIDTH,
        memory_attention_num_layers=2,
        memory_attention_feed_forward_hidden_size=512,
        memory_attention_dropout=0.0,
        memory_attention_rope_dropout=0.0,
        memory_attention_rope_feat_sizes=[sides[-1], sides[-1]],
        memory_encoder_hidden_size=WIDTH,
        memory_encoder_output_channels=MEMORY,
        mask_downsampler_embed_dim=WIDTH,
        memory_fuser_embed_dim=WIDTH,
        memory_fuser_intermediate_dim=512,
        memory_fuser_layer_scale_init_value=0.1,
    )


def make_segmenter(seed: int = 0) -> Any:
    """A `Sam2VideoModel` with random weights, in eval mode, because outputs in training mode are incomplete for
    tracking."""
    from transformers import Sam2VideoModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Sam2VideoModel(segmenter_config()).eval()
    for module in model.modules():
        if hasattr(module, "layer_norm") and hasattr(module, "scale") and isinstance(module.scale, nn.Parameter):
            nn.init.constant_(module.scale, 0.1)  # of the memory fuser; transformers initialises it near 0
    # initially predict that the figure is present, because masks of absent figures get no gradient
    nn.init.constant_(model.mask_decoder.pred_obj_score_head.proj_out.bias, 2.0)
    return model


def save_segmenter(model: Any, folder: Path) -> None:
    """Write a folder for `transformers` and `--segmenter-weights`, with fp16 weights; replaces an older one."""
    from transformers import Sam2VideoModel

    kept = Sam2VideoModel(segmenter_config())
    kept.load_state_dict({name: tensor.detach().float().cpu() for name, tensor in model.state_dict().items()})
    kept.half().save_pretrained(folder)


@dataclass(frozen=True, slots=True)
class Unrolled:
    """The outputs for T frames of B clips.

    masks   mask logits [T, B, h, w]
    seen    logits of the figure's presence [T, B]
    iou     predicted IoU [T, B]"""

    masks: Tensor
    seen: Tensor
    iou: Tensor


def unroll(model: Any, frames: Tensor, points: Tensor, labels: Tensor) -> Unrolled:
    """Track one figure per clip. frames [B, T, 3, S, S], normalised; points [B, 1, P, 2] in pixels of the first frame,
    labels [B, 1, P]."""
    from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoInferenceSession

    count, length = frames.shape[:2]
    session = Sam2VideoInferenceSession(
        video_height=IMAGE, video_width=IMAGE, inference_device=frames.device, inference_state_device=frames.device,
        dtype=torch.float32,
    )  # fmt: skip
    figure = session.obj_id_to_idx(1)
    vision = model.get_image_features(frames.flatten(0, 1), return_dict=True)
    maps, codes = ([each.unflatten(1, (count, length)) for each in list(every)] for every in
                   (vision.fpn_hidden_states, vision.fpn_position_encoding))  # fmt: skip
    outputs = []
    expected: list[Tensor] = []
    watch = model.mask_decoder.register_forward_hook(lambda module, args, out: expected.append(out[1][:, 0, 0]))
    with batched_memory(model), watch:
        for time in range(length):
            features = {"vision_feats": [each[:, :, time] for each in maps],
                        "vision_pos_embeds": [each[:, :, time] for each in codes]}  # fmt: skip
            session.cache.cache_vision_features(time, features)
            first = time == 0
            out = model._run_single_frame_inference(
                inference_session=session, frame_idx=time, obj_idx=figure, batch_size=1, is_init_cond_frame=first,
                point_inputs={"point_coords": points, "point_labels": labels} if first else None,
                mask_inputs=None, reverse=False, streaming=True,
            )  # fmt: skip
            memory, code = model._encode_new_memory(
                features["vision_feats"][-1], out["high_res_masks"], out["object_score_logits"], is_mask_from_pts=first
            )
            stored = {**out, "maskmem_features": memory, "maskmem_pos_enc": code}
            session.store_output(figure, time, output_value=stored, is_conditioning_frame=first)
            outputs.append((out["pred_masks"][:, 0], out["object_score_logits"].flatten()))
    masks, seen = (torch.stack(each) for each in zip(*outputs, strict=True))
    return Unrolled(masks, seen, torch.stack(expected))


@contextmanager
def batched_memory(model: Any) -> Iterator[None]:
    """Inside this context, the memory attention returns [B, HW, C] for B clips, the layout that its caller expects."""
    hook = model.memory_attention.register_forward_hook(lambda module, args, out: out.transpose(0, 1).squeeze(1))
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def attention_in_pieces(most: int = ATTENTION_HEADS) -> Iterator[None]:
    """Inside this context, attention calls are split so that batch size times heads is at most `most`. The windows of
    the encoder are batch items, 256 per picture, and CUDA's kernels allow 65,535."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    unsplit = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def pieces(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **how: Any) -> Any:
        items = max(most // query.shape[1], 1)
        if len(query) <= items:
            return unsplit(module, query, key, value, attention_mask, **how)
        parts = zip(query.split(items), key.split(items), value.split(items), strict=True)
        return torch.cat([unsplit(module, *part, attention_mask, **how)[0] for part in parts]), None

    cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)  # fails for this many windows
    ALL_ATTENTION_FUNCTIONS["sdpa"] = pieces
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = unsplit
        torch.backends.cuda.enable_cudnn_sdp(cudnn)


@contextmanager
def kept_codes() -> Iterator[None]:
    """Inside this context, every sine position encoding is cached. `transformers` caches only the last one, and a
    recorded CUDA graph would read freed memory."""
    from transformers.models.sam2 import modeling_sam2
    from transformers.models.sam2_video import modeling_sam2_video

    classes: tuple[Any, ...] = (
        modeling_sam2.Sam2SinePositionEmbedding,
        modeling_sam2_video.Sam2VideoPositionEmbeddingSine,
    )
    saved = [each.build_sine_position_embedding for each in classes]
    for each, build in zip(classes, saved, strict=True):
        each.build_sine_position_embedding = staticmethod(cache(build.__wrapped__))
    try:
        yield
    finally:
        for each, build in zip(classes, saved, strict=True):
            each.build_sine_position_embedding = staticmethod(build)
