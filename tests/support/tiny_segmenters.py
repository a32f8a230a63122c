"""Folders of segmenters with random weights: the real classes of `transformers`, with minimal sizes."""

import json
from pathlib import Path
from typing import Any

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "human", "character", "person", "dog")


def write_sam2(folder: Path, image: int = 128, seed: int = 0) -> Path:
    """A `Sam2VideoModel` of the published shape: features at a quarter, an eighth and a sixteenth."""
    from transformers import Sam2VideoConfig, Sam2VideoModel
    from transformers.models.sam2_video import Sam2VideoMaskDecoderConfig, Sam2VideoPromptEncoderConfig

    sides = [image // 4, image // 8, image // 16]
    config = Sam2VideoConfig(
        vision_config={
            "model_type": "sam2_vision_model", "backbone_channel_list": [64, 32, 16, 8], "fpn_hidden_size": 128,
            "backbone_feature_sizes": [[side, side] for side in sides],
            "backbone_config": {
                "model_type": "sam2_hiera_det_model", "hidden_size": 8, "image_size": [image, image],
                "blocks_per_stage": [1, 1, 2, 1], "embed_dim_per_stage": [8, 16, 32, 64],
                "num_attention_heads_per_stage": [1, 1, 1, 1], "window_size_per_stage": [8, 4, 4, 4],
                "global_attention_blocks": [3],
            },
        },
        prompt_encoder_config=Sam2VideoPromptEncoderConfig(hidden_size=128, image_size=image),
        mask_decoder_config=Sam2VideoMaskDecoderConfig(
            hidden_size=128, mlp_dim=32, num_attention_heads=2, iou_head_hidden_dim=32
        ),
        image_size=image, memory_attention_hidden_size=128, memory_attention_num_layers=1,
        memory_attention_feed_forward_hidden_size=32, memory_attention_rope_feat_sizes=[sides[-1], sides[-1]],
        memory_encoder_hidden_size=128, mask_downsampler_embed_dim=128, memory_fuser_embed_dim=128,
        memory_fuser_num_layers=1, memory_fuser_intermediate_dim=32,
    )  # fmt: skip
    return _saved(Sam2VideoModel, config, folder, seed)


def write_grounding_dino(folder: Path, seed: int = 0) -> Path:
    from transformers import GroundingDinoConfig, GroundingDinoForObjectDetection

    config = GroundingDinoConfig(
        backbone_config={
            "model_type": "swin", "image_size": 64, "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1],
            "window_size": 4, "out_features": ["stage2", "stage3", "stage4"],
        },
        text_config={
            "model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1,
            "intermediate_size": 16, "vocab_size": len(WORDS), "max_position_embeddings": 64,
        },
        d_model=32, encoder_layers=1, decoder_layers=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
        encoder_attention_heads=2, decoder_attention_heads=2, num_queries=8, max_text_len=32,
    )  # fmt: skip
    write_words(folder)
    return _saved(GroundingDinoForObjectDetection, config, folder, seed)


def write_sam3(folder: Path, image: int = 112, seed: int = 0) -> Path:
    """A `Sam3VideoModel`: one encoder, a detector by text, and the tracker."""
    from transformers import Sam3VideoConfig, Sam3VideoModel

    cells = image // 14
    vision = {
        "model_type": "sam3_vision_model", "fpn_hidden_size": 128,
        "backbone_feature_sizes": [[4 * cells, 4 * cells], [2 * cells, 2 * cells], [cells, cells]],
        "backbone_config": {
            "model_type": "sam3_vit_model", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": image, "pretrain_image_size": 56, "window_size": 4,
            "global_attn_indexes": [1],
        },
    }  # fmt: skip
    small = {"hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 32}
    detector = {
        "model_type": "sam3", "vision_config": vision,
        "text_config": {
            "model_type": "clip_text_model", "bos_token_id": 2, "eos_token_id": 3,
            "vocab_size": len(WORDS), "hidden_size": 32, "intermediate_size": 32,
            "num_hidden_layers": 1, "num_attention_heads": 2, "projection_dim": 32, "max_position_embeddings": 32,
        },
        "geometry_encoder_config": small | {"num_layers": 1}, "detr_encoder_config": small | {"num_layers": 1},
        "detr_decoder_config": small | {"num_layers": 1, "num_queries": 8},
        "mask_decoder_config": {"hidden_size": 128, "num_attention_heads": 2},
    }  # fmt: skip
    tracker = {
        "model_type": "sam3_tracker_video", "vision_config": vision, "image_size": image,
        "prompt_encoder_config": {"hidden_size": 128, "image_size": image},
        "mask_decoder_config": {
            "hidden_size": 128, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 32,
        },
        "memory_attention_hidden_size": 128, "memory_attention_num_layers": 1,
        "memory_attention_feed_forward_hidden_size": 32, "memory_attention_rope_feat_sizes": [cells, cells],
        "memory_encoder_hidden_size": 128, "mask_downsampler_embed_dim": 128, "memory_fuser_embed_dim": 128,
        "memory_fuser_num_layers": 1, "memory_fuser_intermediate_dim": 32,
    }  # fmt: skip
    config = Sam3VideoConfig(detector_config=detector, tracker_config=tracker, low_res_mask_size=4 * cells)
    write_words(folder)
    return _saved(Sam3VideoModel, config, folder, seed)


def write_words(folder: Path) -> None:
    """A tokenizer that knows `WORDS`."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import BertPreTokenizer
    from tokenizers.processors import TemplateProcessing

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", WORDS.index("[CLS]")), ("[SEP]", WORDS.index("[SEP]"))]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def _saved(kind: Any, config: Any, folder: Path, seed: int) -> Path:
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(config).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("pred_obj_score_head.proj_out.bias"):
                torch.nn.init.constant_(parameter, 1.0)  # predict that every figure is present
    model.save_pretrained(folder)
    return folder
