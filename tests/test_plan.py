"""The plan of the main job: its settings fit the machine, and its numbers are those of the model."""

from __future__ import annotations

import pytest

from nanochat.common import UserError
from scripts import plan, presets
from scripts.presets import KNOBS, PRESETS, Machine

H100 = "NVIDIA H100 80GB HBM3"


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_divides_its_steps(preset: str) -> None:
    machine = Machine((H100,) * (8 if preset == "gpu8" else 1), 80.0, 16)
    settings = plan.resolve({"PRESET": preset}, machine)
    for stage in ("BASE", "MID", "SFT"):
        round_tokens = (
            int(settings[f"{stage}_DEVICE_BATCH_SIZE"])
            * int(settings["SEQUENCE_LEN"])
            * int(settings["NPROC"])
        )
        assert int(settings[f"{stage}_BATCH_TOKENS"]) % round_tokens == 0


def test_the_plan_counts_as_the_model_does() -> None:
    torch = pytest.importorskip("torch")
    from nanochat.gpt import GPT

    for env in ({"PRESET": "cpu"}, {"PRESET": "lite"}, {"PRESET": "gpu8", "DEPTH": "2", "VOCAB_SIZE": "512"}):
        config = plan.model(plan.resolve(env, Machine((H100,), 80.0, 2)))
        with torch.device("meta"):
            model = GPT(config)
        assert plan.num_params(config) == model.num_params()
        assert plan.flops_per_token(config, 64) == pytest.approx(model.flops_per_token(64), rel=1e-3)


def test_the_plan_knows_the_published_sizes() -> None:
    settings = plan.resolve({"DEPTH": "20"}, Machine((H100,) * 8, 80.0, 208))
    (base, *_) = plan.work(settings)
    assert base.num_tokens == pytest.approx(20 * 560_988_160, rel=1e-3)
    assert base.flops == pytest.approx(3.9e19, rel=0.02)
    hours = plan.seconds(settings, [base], presets.GPUS[3], 8) / 3600
    assert presets.GPUS[3].name == "H100" and 3 < hours < 4


def test_knobs_have_one_kind_of_value_and_distinct_names() -> None:
    assert len({knob.name for knob in KNOBS}) == len(KNOBS)
    for knob in KNOBS:
        kinds = {type(value) for value in knob.values if value != ""}
        assert len(kinds) <= 1, f"{knob.name}: {kinds}"


def test_an_unknown_gpu_is_planned_for_by_its_memory() -> None:
    settings = plan.resolve({}, Machine(("Some GPU 9000",), 12.0, 8))
    assert settings["PRESET"] == "gpu1"
    assert plan.memory_gib(settings, int(settings["BASE_DEVICE_BATCH_SIZE"])) < 12
    assert "this machine" not in plan.describe(settings, Machine(("Some GPU 9000",), 12.0, 8))


def test_three_gpus_use_as_many_as_divide_the_step() -> None:
    assert plan.resolve({}, Machine((H100,) * 3, 80.0, 8))["NPROC"] == 2
    with pytest.raises(UserError, match="does not divide"):
        plan.resolve({"NPROC": "3"}, Machine((H100,) * 3, 80.0, 8))


def test_more_cores_take_less_time_though_the_processes_are_as_many() -> None:
    def line(cores: int) -> str:
        machine = Machine((), 0.0, cores)
        settings = plan.resolve({"PRESET": "cpu"}, machine)
        return next(row for row in plan.describe(settings, machine).splitlines() if "this machine" in row)

    settings = plan.resolve({"PRESET": "cpu"}, Machine((), 0.0, 16))
    expected = plan._time(plan.seconds(settings, plan.work(settings), None, 16))
    assert line(16) == f"this machine: about {expected}" != line(4)


def test_one_pass_of_rl_is_over_its_own_questions_not_over_those_of_sft() -> None:
    for dataset, questions in (("GSM8K", 7_005), ("SYNTHETIC", 100_000)):
        env = {
            "RL_STEPS": "-1",
            "RL_DATASET": dataset,
            "AQUA_TRAIN_EXAMPLES": "64",
            "EXAMPLES_PER_STEP": "16",
        }
        *_, rl = plan.work(plan.resolve(env, Machine((H100,), 80.0, 16)))
        assert rl.num_steps == questions // 16


def test_a_gpu_is_known_by_its_own_name() -> None:
    for name, known in (("NVIDIA GH200 480GB", "GH200"), ("NVIDIA H200", "H200"), ("NVIDIA GB200", "B200")):
        gpu = Machine((name,), 96.0, 64).gpu
        assert gpu is not None and gpu.name == known
    assert Machine(("1x GH200 (96 GB)",), 96.0, 64).gpu == Machine(("NVIDIA GH200 480GB",), 96.0, 64).gpu
