"""Laws of denoisers around denoisers: nothing that their base says is forgotten on the way."""

import inspect
import pkgutil
from importlib import import_module

import pytest
import torch
from test_generation_guidance import Letters, drawn, painter
from torch import nn

import sfumato
from sfumato.errors import Refused
from sfumato.models.condition import Condition
from sfumato.models.control import ControlledDenoiser, ControlPlan, add_control_modules
from sfumato.models.guidance_policy import GuidancePolicy, PipelineGuidance
from sfumato.models.interface import OWN_TO_A_WRAPPER, Denoiser, DenoiserWrapper, Stage
from sfumato.models.networks.dit import DiT
from sfumato.models.pretrained.train_text_encoders import DenoiserWithTextEncoders

MEMBERS = sorted(
    name
    for name in {*vars(Denoiser), *vars(Stage), *Denoiser.__annotations__}
    if not name.startswith("_") and name not in OWN_TO_A_WRAPPER
)

CHANGED = {
    ControlledDenoiser: {
        "supports_packing": "control modules read pictures in batches of one shape",
        "finalize_latents": "the base is told nothing of what control modules read",
        "mask_error": "the base is told nothing of what control modules read",
        "check_context_parallel": "what control modules read is not shared among processes",
        "enable_context_parallel": "what control modules read is not shared among processes",
    },
    DenoiserWithTextEncoders: {},
}
"""The wrappers, with what they change on purpose and why."""


class Speaking(Denoiser):
    """A denoiser no public member of which is as usual."""

    kind = "speaking"
    own_name = "file.py:Speaking"
    lora_targets = ("one",)
    micro_conditioning = "time_ids"
    trains_micro_conditioning = True
    latent_multiple = 3
    frames_apart = True
    compute_dtype = torch.bfloat16
    supports_packing = True
    family = "a family"
    guidance = PipelineGuidance(True, {"true_cfg_scale": 1.0}, True)

    def __init__(self):
        super().__init__()
        self.network = nn.Linear(2, 2)

    def config(self):
        return {"said": 1}

    def forward(self, x, clock, condition):
        return x

    def companions(self, model):
        return {"control": model}

    def mask_error(self, error, condition):
        return error[:1]

    def finalize_latents(self, x, condition):
        return x + 1

    def check_context_parallel(self, count):
        pass

    def enable_context_parallel(self, mesh):
        pass


def wrapped(kind: type[DenoiserWrapper], base: Denoiser) -> DenoiserWrapper:
    if kind is ControlledDenoiser:
        return ControlledDenoiser(base, [])
    return DenoiserWithTextEncoders(base, {"text_encoder": nn.Linear(1, 1)})


def every_wrapper() -> set[type]:
    """Every class of the stages that stands around a denoiser."""
    for found in pkgutil.walk_packages(sfumato.models.__path__, "sfumato.models."):
        import_module(found.name)
    known, todo = set(), [DenoiserWrapper]
    while todo:
        more = todo.pop().__subclasses__()
        known |= {one for one in more if one.__module__.startswith("sfumato")}
        todo += more
    return known


def test_every_wrapper_is_listed_here():
    assert every_wrapper() == set(CHANGED)


def test_the_denoiser_of_these_laws_says_something_of_its_own_about_every_member():
    """Law: no member is compared with its default, which a forgetful wrapper would give too."""
    silent = [name for name in MEMBERS if name != "backbone" and name not in vars(Speaking)]
    assert not silent


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("kind", CHANGED)
def test_every_member_is_the_bases_or_is_changed_on_purpose(kind, name):
    """Law: wrapped.name is base.name; what is listed as changed is defined by the wrapper itself."""
    base = Speaking()
    found, expected = getattr(wrapped(kind, base), name), getattr(base, name)
    if name in CHANGED[kind]:
        assert name in vars(kind) and found != expected
    else:
        assert name not in vars(kind)
        assert found == expected if inspect.ismethod(found) else found is expected


@pytest.mark.parametrize("kind", CHANGED)
def test_what_is_set_on_a_wrapper_is_set_on_its_base(kind):
    base = Speaking()
    wrapped(kind, base).compute_dtype = torch.float16
    assert base.compute_dtype is torch.float16


def test_wrappers_of_wrappers_hand_on_the_same_guidance():
    base = Speaking()
    both = DenoiserWithTextEncoders(ControlledDenoiser(base, []), {})
    assert both.guidance is base.guidance and both.backbone is base.network


def test_our_dit_beside_a_guide_draws_with_perturbed_attention():
    """Law: what it draws alone it draws beside a control module that says nothing yet, bit for bit."""
    model = painter(conditioner=Letters())
    alone = drawn(model, pag_scale=1.5)
    add_control_modules(model, [ControlPlan("controlnet")])
    assert torch.equal(drawn(model, pag_scale=1.5), alone)
    assert not torch.equal(drawn(model), alone)


def test_pictures_that_guide_are_not_shared_among_processes():
    controlled = ControlledDenoiser(DiT(3, width=32, depth=2, heads=2, text_width=0), [])
    controlled.enable_context_parallel(None)
    with pytest.raises(Refused, match=r"train\.context_parallel at 1"):
        controlled.check_context_parallel(2)


def test_a_policy_says_what_classifier_free_guidance_is():
    """Law: scale 1 gives the prompted answer back, bit for bit, and 0 the other."""
    strong, weak = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    policy = GuidancePolicy()
    assert torch.equal(policy.combine(strong, weak, 1.0), strong)
    assert torch.equal(policy.combine(strong, weak, 0.0), weak)
    assert not policy.needs_negative(1.0, False) and policy.needs_negative(0.5, False)
    told = Condition({"tokens": torch.zeros(2, 1, 1)})
    assert policy.embed_guidance(told, 3.0) is told
