"""``torch_compile``: the layers of the student are compiled where they are; the losses around them run as they are.

accelerate would compile the whole forward, in which daekit's loss runs: torch fails on its autograd functions.
"""

from __future__ import annotations

from accelerate.utils import TorchDynamoPlugin
from trl import SFTTrainer

from daekit.errors import UserError
from daekit.models.backbone import decoder_layers
from daekit.teachers.parts import leaves


def compile_layers(trainer: SFTTrainer) -> None:
    """Compile each layer of the student in place, and keep accelerate from compiling what is around them.

    Raises:
        UserError: an engine that splits parameters or steps itself; teachers that are adapters on the student's own layers.
    """
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise UserError(
            "torch_compile=True: was not tried under FSDP2 and DeepSpeed, whose hooks gather each layer while it runs. Leave "
            "it out, or launch with recipes/accelerate/ddp.yaml."
        )
    if trainer.teacher is not None and any(getattr(each, "model", None) is trainer.model for each in leaves(trainer.teacher)):
        raise UserError(
            "torch_compile=True: a teacher or the reference is an adapter on the student's own layers, switched by hooks that "
            "a compiled layer does not look for. Leave it out, or give models of their own."
        )
    trainer.accelerator.state.dynamo_plugin = TorchDynamoPlugin(backend="no")
    for layer in decoder_layers(trainer.model):
        layer.compile(backend=trainer.args.torch_compile_backend, mode=trainer.args.torch_compile_mode)
