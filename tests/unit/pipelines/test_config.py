import json
from dataclasses import dataclass

import pytest

from data.core.option import option
from pipelines.train_vae import TrainVAEConfig
from pipelines.training.config import dump, flatten, free_keys, load, parse
from pipelines.training.settings import Precision


@dataclass
class Inner:
    rate: float = option(0.1, "a rate")


@dataclass
class Named:
    name: str = option("x", "a name")


@dataclass
class Settings:
    steps: int = option(5, "how many", free=True)
    precision: Precision = option(Precision.fp32, "arithmetic")
    sizes: list[int] = option([1, 2], "sizes")
    inner: Inner = option(Inner, "")


def test_the_last_word_wins_default_then_file_then_override(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("steps: 7\ninner: {rate: 1e-4}\n")
    assert load(Settings, file) == Settings(steps=7, inner=Inner(rate=1e-4))
    assert load(Settings, file, ["steps=8", "precision=bf16"]) == Settings(
        8, Precision.bf16, [1, 2], Inner(1e-4)
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stps=3", "unknown key 'stps'; did you mean 'steps'"),
        ("inner.rat=3", "did you mean 'inner.rate'"),
        ("steps=5.5", "steps"),
        ("steps=many", "steps"),
        ("precision=fp8", "fp32"),
        ("loose", "written key=value"),
    ],
)
def test_wrong_settings_are_named(override, message):
    with pytest.raises(ValueError, match=message):
        load(Settings, None, [override])


def test_an_empty_value_is_an_empty_text():
    assert load(Named, None, ["name="]) == Named("")


@pytest.mark.parametrize("text", ["001", "1e3", "2024_01", "null", "[a]", "a=b"])
def test_a_text_is_taken_as_it_stands(text):
    assert load(Named, None, [f"name={text}"]) == Named(text)


@pytest.mark.parametrize(("text", "message"), [("steps: [", "not valid YAML"), ("- 1", "not a list")])
def test_a_file_that_holds_no_settings_is_named(tmp_path, text, message):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load(Settings, tmp_path / "x.yaml")


def test_a_missing_config_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nothing.yaml: no such file"):
        load(Settings, tmp_path / "nothing.yaml")


def test_dump_and_load_give_the_same_settings(tmp_path):
    settings = Settings(9, Precision.bf16, [3], Inner(0.5))
    (tmp_path / "x.yaml").write_text(dump(settings))
    assert load(Settings, tmp_path / "x.yaml") == settings
    assert flatten(settings) == {"steps": 9, "precision": "bf16", "sizes": [3], "inner.rate": 0.5}
    assert free_keys(settings) == {"steps"}


def test_flags_and_settings_may_be_mixed_in_any_order():
    config, args = parse(
        Settings, ["sizes=[4]", "--rate", "2", "steps=1", "--dry-run"], "x", "about", {"--rate": "inner.rate"}
    )
    assert config == Settings(1, Precision.fp32, [4], Inner(2.0))
    assert args.dry_run


def test_help_lists_every_key_with_default_and_meaning(capsys):
    with pytest.raises(SystemExit):
        parse(Settings, ["--help"], "x", "about")
    text = capsys.readouterr().out
    assert "steps=5  how many" in text
    assert "inner.rate=0.1  a rate" in text
    assert "precision='fp32' [fp32|tf32|bf16]" in text


def test_text_stays_text_and_nothing_of_the_environment_gets_into_a_setting(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "hunter2")
    texts = [
        "${oc.env:SECRET}",
        "/data/${set}/x",
        "${",
        "a ${b} ${oc.env:SECRET,x}",
        "$HOME",
        "\\${x}",
        "1e3",
    ]
    for text in texts:
        (tmp_path / "c.yaml").write_text(
            f"source: {{root: {json.dumps(text)}}}\nrun_dir: {json.dumps(text)}\n"
        )
        for config in (
            load(TrainVAEConfig, tmp_path / "c.yaml"),
            load(TrainVAEConfig, None, [f"source.root={text}", f"run_dir={text}"]),
        ):
            assert (config.source.root, config.run_dir) == (text, text)
            (tmp_path / "again.yaml").write_text(dump(config))
            assert load(TrainVAEConfig, tmp_path / "again.yaml") == config
    (tmp_path / "c.yaml").write_text('run_dir: "\\x24{oc.env:SECRET}"\n')  # hidden from a search for ${
    assert load(TrainVAEConfig, tmp_path / "c.yaml").run_dir == "${oc.env:SECRET}"
    with pytest.raises(ValueError, match="steps"):
        load(TrainVAEConfig, None, ["steps=${oc.env:SECRET}"])


def test_the_home_folder_may_be_written_short_in_a_file_too(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / "c.yaml").write_text("source: {root: ~/videos}\n")
    assert load(TrainVAEConfig, tmp_path / "c.yaml").source.root == "/home/me/videos"
