"""The small SAM 2: the classes of `transformers` with a configuration of 3.3 million parameters, unrolled in batches.

`Sam2VideoModel.forward` takes one clip and each of its figures by itself. Here many clips, of one figure each, go
through the model's own methods side by side: vision features of all frames at once, then frame by frame the memory
attention, the mask decoder and the memory encoder. A test holds both forms together.

Beside the published shape: features at a half, a quarter and an eighth of the picture, which is 256 wide (a drawn clip
is 128 wide, so a mask is as fine as the clip); one mask for a prompt instead of the best of three; no temporal code for
object pointers.
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
WIDTH = 128  # of decoder and memory
MEMORY = 64  # what the memory attention of `transformers` is written for
ATTENTION_HEADS = 32_768  # in one call
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
    """A `Sam2VideoModel` with random weights, in eval mode: in training mode its outputs lack what tracking needs."""
    from transformers import Sam2VideoModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Sam2VideoModel(segmenter_config()).eval()
    for module in model.modules():
        if hasattr(module, "layer_norm") and hasattr(module, "scale") and isinstance(module.scale, nn.Parameter):
            nn.init.constant_(module.scale, 0.1)  # of the memory fuser, which transformers begins at nothing
    # a figure begins as there: the mask of what is absent learns nothing
    nn.init.constant_(model.mask_decoder.pred_obj_score_head.proj_out.bias, 2.0)
    return model


def save_segmenter(model: Any, folder: Path) -> None:
    """A folder that `transformers` and `--segmenter-weights` open, with fp16 weights; an older one is replaced."""
    from transformers import Sam2VideoModel

    kept = Sam2VideoModel(segmenter_config())
    kept.load_state_dict({name: tensor.detach().float().cpu() for name, tensor in model.state_dict().items()})
    kept.half().save_pretrained(folder)


@dataclass(frozen=True, slots=True)
class Unrolled:
    """Over T frames of B clips: mask logits [T, B, h, w], whether the figure is seen [T, B] (logits), and what IoU the
    model expects [T, B]."""

    masks: Tensor
    seen: Tensor
    iou: Tensor


def unroll(model: Any, frames: Tensor, points: Tensor, labels: Tensor) -> Unrolled:
    """frames [B, T, 3, S, S], normalised; points [B, 1, P, 2] in pixels of the first one, labels [B, 1, P]."""
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
    """Inside, what the memory attention answers for B clips has the order that its caller expects: [B, HW, C]."""
    hook = model.memory_attention.register_forward_hook(lambda module, args, out: out.transpose(0, 1).squeeze(1))
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def attention_in_pieces(most: int = ATTENTION_HEADS) -> Iterator[None]:
    """Inside, the models' scaled-dot-product attention is computed for at most `most` heads at a time, those of all
    items of a batch counted: the encoder's windows are items, 256 of a picture, and CUDA's kernels take 65,535."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    whole = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def pieces(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **how: Any) -> Any:
        items = max(most // query.shape[1], 1)
        if len(query) <= items:
            return whole(module, query, key, value, attention_mask, **how)
        parts = zip(query.split(items), key.split(items), value.split(items), strict=True)
        return torch.cat([whole(module, *part, attention_mask, **how)[0] for part in parts]), None

    cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)  # fails for as many windows
    ALL_ATTENTION_FUNCTIONS["sdpa"] = pieces
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = whole
        torch.backends.cuda.enable_cudnn_sdp(cudnn)


@contextmanager
def kept_codes() -> Iterator[None]:
    """Inside, every sine code is made once and kept: `transformers` keeps the last alone, and a recorded CUDA graph
    would go on reading one that is gone."""
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
