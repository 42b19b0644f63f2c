"""Tiny pipelines as one file in their makers' layout: diffusers' converters, backwards."""

import re
from typing import Any

import torch
from torch import Tensor

Weights = dict[str, Tensor]


def renamed(weights: Weights, rules: list[tuple[str, str]], prefix: str = "") -> Weights:
    """The weights under other names, each rule a pattern with what replaces it, in order."""
    out: Weights = {}
    for key, tensor in weights.items():
        for pattern, there in rules:
            key = re.sub(pattern, there, key)
        out[prefix + key] = tensor.contiguous()
    return out


RESNET = [
    (r"norm1\.", "in_layers.0."), (r"conv1\.", "in_layers.2."), (r"norm2\.", "out_layers.0."),
    (r"conv2\.", "out_layers.3."), (r"time_emb_proj\.", "emb_layers.1."),
    (r"conv_shortcut\.", "skip_connection."),
]  # fmt: skip
AROUND = [
    (r"^time_embedding\.linear_1", "time_embed.0"), (r"^time_embedding\.linear_2", "time_embed.2"),
    (r"^add_embedding\.linear_1", "label_emb.0.0"), (r"^add_embedding\.linear_2", "label_emb.0.2"),
    (r"^conv_in", "input_blocks.0.0"), (r"^conv_norm_out", "out.0"), (r"^conv_out", "out.2"),
    (r"^mid_block\.attentions\.0", "middle_block.1"),
]  # fmt: skip


def unet(network: Any) -> Weights:
    """A UNet in the layout of latent-diffusion: input, middle and output blocks, counted through."""
    layers = network.config.layers_per_block
    out: Weights = {}
    for key, tensor in network.state_dict().items():
        for pattern, there in AROUND:
            key = re.sub(pattern, there, key)
        resnet = ".resnets." in key
        if found := re.match(r"down_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.*)", key):
            block, kind, layer, rest = found.groups()
            place = (layers + 1) * int(block) + int(layer) + 1
            key = f"input_blocks.{place}.{int(kind == 'attentions')}.{rest}"
        elif found := re.match(r"down_blocks\.(\d+)\.downsamplers\.0\.conv\.(.*)", key):
            key = f"input_blocks.{(layers + 1) * (int(found[1]) + 1)}.0.op.{found[2]}"
        elif found := re.match(r"up_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.*)", key):
            block, kind, layer, rest = found.groups()
            key = f"output_blocks.{(layers + 1) * int(block) + int(layer)}.{int(kind == 'attentions')}.{rest}"
        elif found := re.match(r"up_blocks\.(\d+)\.upsamplers\.0\.conv\.(.*)", key):
            attends = hasattr(network.up_blocks[int(found[1])], "attentions")
            key = f"output_blocks.{(layers + 1) * int(found[1]) + layers}.{1 + attends}.conv.{found[2]}"
        elif found := re.match(r"mid_block\.resnets\.(\d+)\.(.*)", key):
            key = f"middle_block.{2 * int(found[1])}.{found[2]}"
        for pattern, there in RESNET if resnet else []:
            key = re.sub(pattern, there, key)
        out[f"model.diffusion_model.{key}"] = tensor.contiguous()
    return out


def autoencoder(network: Any, prefix: str = "first_stage_model.") -> Weights:
    """AutoencoderKL in the layout of latent-diffusion."""
    last = len(network.config.block_out_channels) - 1
    rules = [
        (r"encoder\.down_blocks\.(\d+)\.resnets\.", r"encoder.down.\1.block."),
        (r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample."),
        (r"mid_block\.resnets\.0", "mid.block_1"), (r"mid_block\.resnets\.1", "mid.block_2"),
        (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
        (r"mid_block\.attentions\.0\.to_(q|k|v)\.", r"mid.attn_1.\1."),
        (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
        (r"conv_norm_out", "norm_out"), (r"conv_shortcut", "nin_shortcut"),
    ]  # fmt: skip
    out: Weights = {}
    for key, tensor in renamed(network.state_dict(), rules).items():
        if found := re.match(r"decoder\.up_blocks\.(\d+)\.(resnets\.|upsamplers\.0\.)(.*)", key):
            part = "block." if found[2] == "resnets." else "upsample."
            key = f"decoder.up.{last - int(found[1])}.{part}{found[3]}"
        if re.search(r"mid\.attn_1\.(q|k|v|proj_out)\.weight", key):
            tensor = tensor[:, :, None, None]  # their attention is of 1×1 convolutions
        out[prefix + key] = tensor.contiguous()
    return out


def text_model(encoder: Any, prefix: str) -> Weights:
    """CLIP under transformers' older names."""
    whole = {key.removeprefix("text_model."): tensor for key, tensor in encoder.state_dict().items()}
    return {f"{prefix}text_model.{key}": tensor.contiguous() for key, tensor in whole.items()}


def open_clip(encoder: Any, prefix: str) -> Weights:
    """CLIP in the layout of OpenCLIP: q, k and v in one."""
    weights = {key.removeprefix("text_model."): tensor for key, tensor in encoder.state_dict().items()}
    rules = [
        (r"^encoder\.layers\.", "transformer.resblocks."), (r"layer_norm1", "ln_1"),
        (r"layer_norm2", "ln_2"), (r"\.fc1\.", ".c_fc."), (r"\.fc2\.", ".c_proj."),
        (r"self_attn", "attn"), (r"^embeddings\.position_embedding\.weight", "positional_embedding"),
        (r"^embeddings\.", ""), (r"^final_layer_norm", "ln_final"),
        (r"^text_projection\.weight", "text_projection"),
    ]  # fmt: skip
    out = renamed(weights, rules)
    for key in [key for key in out if ".q_proj." in key]:
        parts = [out.pop(key.replace("q_proj", f"{one}_proj")) for one in "qkv"]
        out[key.replace(".q_proj.", ".in_proj_")] = torch.cat(parts)
    out["text_projection"] = out["text_projection"].T.contiguous()
    return {prefix + key: tensor for key, tensor in out.items()}


def fused(weights: Weights, names: list[tuple[str, tuple[str, ...]]]) -> Weights:
    """Layers that end alike, each group of them joined under one name."""
    out = dict(weights)
    for there, ends in names:
        for key in [key for key in out if re.search(re.escape(ends[0]) + r"\.(weight|bias)$", key)]:
            home, suffix = key.rpartition(ends[0])[::2]
            parts = [out.pop(home + end + suffix) for end in ends]
            out[home + there + suffix] = torch.cat(parts)
    return out


def halves_swapped(weights: Weights, *names: str) -> Weights:
    """Scale and shift in the order of the original code."""
    return {
        key: torch.cat(tensor.chunk(2)[::-1]) if key.rpartition(".")[0] in names else tensor
        for key, tensor in weights.items()
    }


ADDED = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
QKV = ("attn.to_q", "attn.to_k", "attn.to_v")


def sd3(network: Any) -> Weights:
    """Stable Diffusion 3's transformer in the layout of its reference code."""
    last = f"transformer_blocks.{network.config.num_layers - 1}.norm1_context.linear"
    weights = halves_swapped(network.state_dict(), "norm_out.linear", last)
    second = tuple(name.replace("attn.", "attn2.") for name in QKV)
    weights = fused(weights, [("x.attn2.qkv", second), ("c.attn.qkv", ADDED), ("x.attn.qkv", QKV)])
    rules = [
        (r"^pos_embed\.proj", "x_embedder.proj"), (r"^pos_embed\.pos_embed", "pos_embed"),
        (r"^time_text_embed\.timestep_embedder\.linear_1", "t_embedder.mlp.0"),
        (r"^time_text_embed\.timestep_embedder\.linear_2", "t_embedder.mlp.2"),
        (r"^time_text_embed\.text_embedder\.linear_1", "y_embedder.mlp.0"),
        (r"^time_text_embed\.text_embedder\.linear_2", "y_embedder.mlp.2"),
        (r"^transformer_blocks", "joint_blocks"), (r"^norm_out\.linear", "final_layer.adaLN_modulation.1"),
        (r"^proj_out", "final_layer.linear"), (r"\.x\.attn", ".x_block.attn"),
        (r"\.c\.attn", ".context_block.attn"), (r"\.attn\.to_out\.0", ".x_block.attn.proj"),
        (r"\.attn2\.to_out\.0", ".x_block.attn2.proj"), (r"\.attn\.to_add_out", ".context_block.attn.proj"),
        (r"\.attn(2?)\.norm_(q|k)\.", r".x_block.attn\1.ln_\2."),
        (r"\.attn\.norm_added_(q|k)\.", r".context_block.attn.ln_\1."),
        (r"\.norm1\.linear", ".x_block.adaLN_modulation.1"),
        (r"\.norm1_context\.linear", ".context_block.adaLN_modulation.1"),
        (r"\.ff\.net\.0\.proj", ".x_block.mlp.fc1"), (r"\.ff\.net\.2", ".x_block.mlp.fc2"),
        (r"\.ff_context\.net\.0\.proj", ".context_block.mlp.fc1"),
        (r"\.ff_context\.net\.2", ".context_block.mlp.fc2"),
    ]  # fmt: skip
    return renamed(weights, rules, "model.diffusion_model.")


def flux(network: Any) -> Weights:
    """FLUX.1's transformer in the layout of its reference code."""
    weights = halves_swapped(network.state_dict(), "norm_out.linear")
    alone = {key: tensor for key, tensor in weights.items() if key.startswith("single_")}
    rest = {key: tensor for key, tensor in weights.items() if key not in alone}
    both = fused(alone, [("linear1", (*QKV, "proj_mlp"))])
    both |= fused(rest, [("txt_attn.qkv", ADDED), ("img_attn.qkv", QKV)])
    rules = [
        (r"^time_text_embed\.timestep_embedder\.linear_1", "time_in.in_layer"),
        (r"^time_text_embed\.timestep_embedder\.linear_2", "time_in.out_layer"),
        (r"^time_text_embed\.text_embedder\.linear_1", "vector_in.in_layer"),
        (r"^time_text_embed\.text_embedder\.linear_2", "vector_in.out_layer"),
        (r"^time_text_embed\.guidance_embedder\.linear_1", "guidance_in.in_layer"),
        (r"^time_text_embed\.guidance_embedder\.linear_2", "guidance_in.out_layer"),
        (r"^context_embedder", "txt_in"), (r"^x_embedder", "img_in"), (r"^proj_out", "final_layer.linear"),
        (r"^norm_out\.linear", "final_layer.adaLN_modulation.1"),
        (r"^(single_.*)\.norm\.linear", r"\1.modulation.lin"), (r"^(single_.*)\.proj_out", r"\1.linear2"),
        (r"^(single_.*)\.attn\.norm_q\.weight", r"\1.norm.query_norm.scale"),
        (r"^(single_.*)\.attn\.norm_k\.weight", r"\1.norm.key_norm.scale"),
        (r"^single_transformer_blocks", "single_blocks"), (r"^transformer_blocks", "double_blocks"),
        (r"\.norm1\.linear", ".img_mod.lin"), (r"\.norm1_context\.linear", ".txt_mod.lin"),
        (r"\.attn\.norm_q\.weight", ".img_attn.norm.query_norm.scale"),
        (r"\.attn\.norm_k\.weight", ".img_attn.norm.key_norm.scale"),
        (r"\.attn\.norm_added_q\.weight", ".txt_attn.norm.query_norm.scale"),
        (r"\.attn\.norm_added_k\.weight", ".txt_attn.norm.key_norm.scale"),
        (r"\.ff\.net\.0\.proj", ".img_mlp.0"), (r"\.ff\.net\.2", ".img_mlp.2"),
        (r"\.ff_context\.net\.0\.proj", ".txt_mlp.0"), (r"\.ff_context\.net\.2", ".txt_mlp.2"),
        (r"\.attn\.to_out\.0", ".img_attn.proj"), (r"\.attn\.to_add_out", ".txt_attn.proj"),
    ]  # fmt: skip
    return renamed(both, rules)


def whole(name: str, pipe: Any) -> Weights:
    """A tiny pipeline of the zoo as one file: what such files usually hold."""
    if name == "stable-diffusion-1.5":
        text = text_model(pipe.text_encoder, "cond_stage_model.transformer.")
        return unet(pipe.unet) | autoencoder(pipe.vae) | text
    if name == "stable-diffusion-xl":
        first = text_model(pipe.text_encoder, "conditioner.embedders.0.transformer.")
        second = open_clip(pipe.text_encoder_2, "conditioner.embedders.1.model.")
        return unet(pipe.unet) | autoencoder(pipe.vae) | first | second
    if name == "stable-diffusion-3.5":
        return sd3(pipe.transformer) | autoencoder(pipe.vae)
    return flux(pipe.transformer)
