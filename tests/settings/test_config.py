"""The settings: layers and origins, round trips, and what is said about every kind of mistake."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Annotated, Literal

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, ValidationError, field_validator, model_validator

from tunesmith.errors import ConfigError
from tunesmith.settings import config
from tunesmith.settings.config import Resolved, Spec, annotated, dump, explain, load, schema


class LoRA(Spec):
    kind: Literal["lora"] = "lora"
    rank: int = Field(16, ge=1, le=512, description="Width of the update.")
    alpha: float = Field(32.0, gt=0)
    targets: Literal["all-linear"] | tuple[str, ...] = ("q_proj", "v_proj")


class DoRA(LoRA):
    kind: Literal["dora"] = "dora"  # type: ignore[assignment]


class Deep(Spec):
    low: int = 0


class Full(Spec):
    kind: Literal["full"] = "full"
    layers: int | None = Field(None, ge=1)
    deep: Deep = Deep(low=5)

    @field_validator("layers")
    @classmethod
    def _lucky(cls, layers: int | None) -> int | None:
        if layers == 13:
            raise ValueError("thirteen brings bad luck")
        return layers


class Optimizer(Spec):
    learning_rate: float = Field(1e-4, gt=0)
    kind: Literal["adamw", "lion"] = "adamw"


class Model(Spec):
    path: str = Field(min_length=1, description="Where the weights are.")
    quantize: Literal[4, 8] | None = None


class Loop(Spec):
    keep_best: bool = True
    validate_every: int | None = 50
    deep: Deep = Deep(low=3)

    @model_validator(mode="after")
    def _checked(self) -> Loop:
        if self.keep_best and self.validate_every is None:
            raise ValueError("keep_best needs validation: set validate_every")
        return self


class Root(Spec):
    model: Model
    adapter: LoRA | DoRA | Full = LoRA()
    second: LoRA | Full | None = Field(None, description="Beside the first.")
    optimizer: Optimizer = Optimizer()
    loop: Loop = Loop()
    share: Annotated[float, Field(ge=0, le=1)] | tuple[str, ...] = 0.2
    tags: dict[str, str] = Field({})


@pytest.fixture
def run_yaml(tmp_path, monkeypatch):
    """Writes run.yaml in an empty working directory, so that origins read ``run.yaml:3``."""
    monkeypatch.chdir(tmp_path)

    def write(text: str, name: str = "run.yaml") -> Path:
        Path(name).write_text(text, encoding="utf-8")
        return Path(name)

    return write


def resolve(path: Path, **layers) -> Resolved[Root]:
    return load(Root, files=[path], **layers)


def told(path: Path, **layers) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve(path, **layers)
    return str(caught.value)


# --- round trips

HOSTILE = [
    "1e-4",
    "no",
    "null",
    "~",
    "010",
    "0o7",
    "1_000",
    "1:30",
    ".5",
    ".inf",
    "2026-01-02",
    "<<",
    "=",
    "# a",
    "a: b",
]
HOSTILE += ["", " x", "a\n\nb\n", "\ufeff", "\x85", "\u2028", "\U0001f600"]
TEXT = st.text(st.characters(blacklist_categories=["Cs"]), max_size=8) | st.sampled_from(HOSTILE)
NUMBER = st.floats(1e-300, 1e300, exclude_min=True)
LORA = st.builds(
    LoRA, rank=st.integers(1, 512), alpha=NUMBER, targets=st.just("all-linear") | st.lists(TEXT, max_size=3)
)
FULL = st.builds(Full, layers=st.none() | st.integers(14, 99))
ROOTS = st.builds(
    Root,
    model=st.builds(Model, path=TEXT.filter(bool), quantize=st.sampled_from([None, 4, 8])),
    adapter=LORA | FULL | st.builds(DoRA, rank=st.integers(1, 512)),
    second=st.none() | LORA | FULL,
    optimizer=st.builds(Optimizer, kind=st.sampled_from(["adamw", "lion"]), learning_rate=NUMBER),
    loop=st.builds(Loop, keep_best=st.booleans(), deep=st.builds(Deep, low=st.integers())),
    share=st.floats(0, 1) | st.lists(TEXT, max_size=3),
    tags=st.dictionaries(TEXT, TEXT, max_size=3),
)


@settings(max_examples=150, deadline=None)
@given(spec=ROOTS)
def test_what_is_dumped_loads_as_an_equal_spec(spec, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "round.yaml"
    path.write_text(dump(spec), encoding="utf-8", newline="")
    again = resolve(path).spec
    assert again == spec
    assert type(again.adapter) is type(spec.adapter) and type(again.second) is type(spec.second)


@settings(max_examples=40, deadline=None)
@given(spec=ROOTS)
def test_annotated_text_loads_as_the_values_it_was_given(spec, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "annotated.yaml"
    path.write_text(annotated(Root, spec.model_dump(mode="json")), encoding="utf-8", newline="")
    assert resolve(path).spec == spec


# --- layers


def test_each_layer_wins_over_those_below_and_is_named_as_the_origin(run_yaml, monkeypatch):
    preset = run_yaml("adapter: {rank: 2}\n", "small.yaml")
    monkeypatch.setattr(config, "presets", lambda: {"small": preset})
    first = run_yaml("model:\n  path: m\nadapter:\n  kind: lora\n  rank: 3\n")
    second = run_yaml("# more\n\nadapter: {rank: 4}\n", "more.yaml")
    layers = [
        ("preset", "small", 2, "preset small"),
        ("files", [first, second], 4, "more.yaml:3"),
        ("environ", {"TUNESMITH_ADAPTER__RANK": "5"}, 5, "TUNESMITH_ADAPTER__RANK"),
        ("sets", ["adapter.rank=6"], 6, "--set"),
        ("overrides", {"adapter.rank": (7, "--rank")}, 7, "--rank"),
    ]
    given_ = {"overrides": {"model.path": ("flag", "--model")}}
    assert load(Root, **given_).origins["adapter.rank"] == "default"
    for name, value, rank, origin in layers:
        given_[name] = {**given_[name], **value} if name == "overrides" else value
        resolved = load(Root, **given_)
        assert (resolved.spec.adapter.rank, resolved.origins["adapter.rank"]) == (rank, origin)
    assert resolved.origins["adapter.kind"] == "run.yaml:4"
    assert resolved.origins["model.path"] == "--model"
    assert resolve(first).origins["adapter.rank"] == "run.yaml:5"


def test_every_leaf_has_an_origin_and_explain_prints_it(run_yaml):
    resolved = resolve(
        run_yaml(
            "model: {path: m}\nadapter:\n  rank: 16\n  targets:\n    - k\nshare: [a, b]\ntags:\n  x: y\n"
        )
    )
    assert explain(resolved) == [
        "model.path m (run.yaml:1)",
        "model.quantize null (default)",
        "adapter.kind lora (default)",
        "adapter.rank 16 (run.yaml:3)",
        "adapter.alpha 32.0 (default)",
        'adapter.targets ["k"] (run.yaml:4)',
        "second null (default)",
        "optimizer.learning_rate 0.0001 (default)",
        "optimizer.kind adamw (default)",
        "loop.keep_best true (default)",
        "loop.validate_every 50 (default)",
        "loop.deep.low 3 (default)",
        'share ["a", "b"] (run.yaml:6)',
        "tags.x y (run.yaml:8)",
    ]


def test_mappings_merge_and_lists_are_replaced(run_yaml):
    first = run_yaml("model: {path: m}\nadapter: {rank: 3, targets: [a, b]}\ntags: {a: one, b: two}\n")
    second = run_yaml("adapter: {targets: [c]}\ntags: {b: three}\n", "more.yaml")
    spec = load(Root, files=[first, second]).spec
    assert spec.adapter == LoRA(rank=3, targets=("c",))
    assert spec.tags == {"a": "one", "b": "three"}


def test_a_default_block_is_a_layer_of_its_own(run_yaml):
    spec = resolve(
        run_yaml("model: {path: m}\nloop: {deep: {}, keep_best: false}\nadapter: {kind: full, deep: {}}")
    ).spec
    assert (spec.loop.deep.low, spec.adapter) == (3, Full(deep=Deep(low=5)))


def test_a_change_of_kind_carries_nothing_over_and_says_what_was_left(run_yaml):
    path = run_yaml("model: {path: m}\nadapter: {kind: lora, rank: 8, alpha: 4}\n")
    resolved = resolve(path, sets=["adapter=dora"])
    assert resolved.spec.adapter == DoRA()
    assert resolved.unused == (
        "adapter.rank 8 (run.yaml:2): not used, adapter is dora (--set)",
        "adapter.alpha 4 (run.yaml:2): not used, adapter is dora (--set)",
    )
    same = resolve(path, sets=["adapter=lora"])
    assert same.spec.adapter == LoRA(rank=8, alpha=4) and same.unused == ()


def test_kinds_of_one_class_keep_their_keys(run_yaml):
    path = run_yaml("model: {path: m}\noptimizer: {learning_rate: 0.5}\n")
    resolved = resolve(path, sets=["optimizer.kind=lion"])
    assert resolved.spec.optimizer == Optimizer(kind="lion", learning_rate=0.5) and resolved.unused == ()


@pytest.mark.parametrize("order", [1, -1])
def test_within_a_layer_the_kind_is_set_before_its_keys(run_yaml, order):
    path = run_yaml("model: {path: m}\n")
    sets = ["adapter.rank=4", "adapter.kind=dora", "adapter.alpha=2"][::order]
    assert resolve(path, sets=sets).spec.adapter == DoRA(rank=4, alpha=2)
    environ = dict(
        [("TUNESMITH_ADAPTER__RANK", "4"), ("TUNESMITH_ADAPTER__ALPHA", "2"), ("TUNESMITH_ADAPTER", "dora")][
            ::order
        ]
    )
    assert resolve(path, environ=environ).spec.adapter == DoRA(rank=4, alpha=2)


def test_of_two_sets_of_one_key_the_later_wins(run_yaml):
    assert resolve(
        run_yaml("model: {path: m}"), sets=["adapter.rank=4", "adapter.rank=5"]
    ).spec.adapter == LoRA(rank=5)


@pytest.mark.parametrize(
    ("text", "adapter"),
    [
        ("adapter: full", Full()),
        ("adapter: {kind: full, layers: 2}", Full(layers=2)),
        ("adapter: {rank: 3}", LoRA(rank=3)),
        ("adapter:", LoRA()),
    ],
)
def test_shorthands_of_a_block_with_kinds(run_yaml, text, adapter):
    assert resolve(run_yaml(f"model: {{path: m}}\n{text}\n")).spec.adapter == adapter


def test_shorthands_in_python_too():
    assert Root(model={"path": "m"}, adapter="dora", second={"rank": 2}).adapter == DoRA()  # type: ignore[arg-type]
    assert Root(model=Model(path="m"), second={"rank": 2}).second == LoRA(rank=2)  # type: ignore[arg-type]
    with pytest.raises(ValidationError):
        Root(model=Model(path="m")).loop.keep_best = False  # type: ignore[misc]


def test_a_block_that_names_no_kind_has_that_of_the_default():
    class Other(Spec):
        adapter: LoRA | Full = Full()

    assert Other(adapter={"layers": 2}).adapter == Full(layers=2)  # type: ignore[arg-type]
    assert load(Other, sets=["adapter.layers=2"]).spec.adapter == Full(layers=2)


def test_lists_become_tuples_at_every_depth():
    class Nested(Spec):
        files: dict[str, tuple[tuple[int, ...], ...]] = Field({})

    spec = load(Nested, sets=["files={a: [[1], [2, 3]]}"]).spec
    assert spec.files == {"a": ((1,), (2, 3))}
    assert Nested(files={"a": [[1], [2, 3]]}) == spec  # type: ignore[arg-type]


def test_an_optional_block_is_null_or_a_block(run_yaml):
    path = run_yaml("model: {path: m}\nsecond: {kind: full, layers: 3}\n")
    assert resolve(path).spec.second == Full(layers=3)
    assert resolve(path, sets=["second="]).spec.second is None


def test_the_environment_of_the_machine_is_not_a_setting(run_yaml):
    source = Path(config.__file__).parents[1].rglob("*.py")
    read = {
        name
        for file in source
        for name in re.findall(r'"(TUNESMITH_[A-Z]+)"', file.read_text(encoding="utf-8"))
    }
    assert {
        "TUNESMITH_ALLOCATOR",
        "TUNESMITH_BLAS",
        "TUNESMITH_CACHE",
        "TUNESMITH_CXXFLAGS",
        "TUNESMITH_DEBUG",
        "TUNESMITH_KERNELS",
    } <= read
    path = run_yaml("model: {path: m}")
    assert resolve(path, environ=dict.fromkeys(read, "off") | {"HOME": "/"})


def test_a_misspelt_variable_of_the_machine_is_told(run_yaml):
    with pytest.raises(
        ConfigError, match=r"TUNESMITH_KERNEL: is no setting\nhint: did you mean TUNESMITH_KERNELS"
    ):
        resolve(run_yaml("model: {path: m}"), environ={"TUNESMITH_KERNEL": "off"})


def test_an_empty_file_says_nothing(run_yaml):
    for text in ("", "# only a comment\n", "---\n"):
        assert resolve(run_yaml(text), sets=["model.path=m"]).spec == Root(model=Model(path="m"))


# --- what YAML means


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1e-4", 1e-4),
        ("1.5E+3", 1500.0),
        ("1e3", 1000.0),
        (".5", 0.5),
        ("7", 7.0),
        ("010", 10.0),
        ("0x10", 16.0),
    ],
)
def test_numbers_are_read_as_yaml_1_2_has_them(run_yaml, written, value):
    spec = resolve(run_yaml(f"model: {{path: m}}\nadapter: {{alpha: {written}}}")).spec
    assert spec.adapter == LoRA(alpha=value) and type(spec.adapter.alpha) is float
    assert resolve(run_yaml("model: {path: m}"), sets=[f"adapter.alpha={written}"]).spec == spec
    assert resolve(run_yaml("model: {path: m}"), environ={"TUNESMITH_ADAPTER__ALPHA": written}).spec == spec


@pytest.mark.parametrize("written", ["no", "on", "2026-01-02", "1:30", "1_000", "'5'"])
def test_text_stays_text(run_yaml, written):
    assert resolve(run_yaml(f"model: {{path: {written}}}")).spec.model.path == written.strip("'")


def test_a_byte_order_mark_is_no_key(run_yaml):
    assert resolve(run_yaml("\ufeffmodel: {path: m}")).spec.model.path == "m"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "model: {path: m}\nadapter:\n  rank: 1\n  rank: 2\n",
            'run.yaml:4: the key "rank" is given twice\nhint: it is already given at run.yaml:3',
        ),
        ("model: {path: m}\n1: x\n", "run.yaml:2: a key must be text\nhint: put it in quotes"),
        ("- a\n- b\n", "run.yaml:1: must be a mapping of keys, not list"),
        (
            "tags: !!python/name:os.system x\n",
            'run.yaml:1: "x" cannot be read as tag:yaml.org,2002:python/name:os.system',
        ),
        (
            "a:\n\t- b\n",
            "run.yaml:2: not readable as YAML: found character '\\t' that cannot start any token\nhint: "
            "text that holds or starts with one of * & : { [ % @ ! needs quotes; indent with spaces",
        ),
    ],
)
def test_what_is_not_settings_is_refused_with_its_line(run_yaml, text, message):
    assert told(run_yaml(text)) == message


def test_an_alias_inside_what_it_repeats_is_refused(run_yaml):
    assert told(run_yaml("tags: &a\n  b: *a\n")).startswith(
        "run.yaml:1: not readable as YAML: maximum recursion depth"
    )


def test_unreadable_files_and_presets_are_named(run_yaml, tmp_path, monkeypatch):
    assert told(Path("none.yaml")) == "none.yaml: cannot be read: No such file or directory"
    (tmp_path / "latin.yaml").write_bytes(b"model: \xe9\xe9")
    assert told(tmp_path / "latin.yaml").endswith("latin.yaml: cannot be read: it is not UTF-8")
    monkeypatch.setattr(config, "presets", lambda: {"mistral-7b": Path("x"), "demo": Path("y")})
    assert (
        told(run_yaml(""), preset="mistral-7")
        == 'no preset is called "mistral-7"\nhint: did you mean mistral-7b?'
    )
    assert told(run_yaml(""), preset="?") == 'no preset is called "?"\nhint: presets: mistral-7b, demo'


# --- mistakes


def test_museum_21_a_key_that_is_accepted_and_ignored(run_yaml):
    """mlx-lm, Unsloth #10452: a key nobody reads is refused wherever it stands and whoever gave it."""
    good = "model: {path: m}\n"
    for text in (
        "extra: 1",
        "model: {path: m, extra: 1}",
        "adapter: {extra: 1}",
        "adapter: {kind: full, extra: 1}",
        "second: {extra: 1}",
        "loop: {deep: {extra: 1}}",
        "loop: {deep: {extra: {low: 1}}}",
    ):
        message = told(run_yaml(text if text.startswith("model") else good + text))
        assert "extra: unknown key" in message and "run.yaml:" in message
    path = run_yaml(good)
    assert "TUNESMITH_LOOP__DEEP__EXTRA: loop.deep.extra: unknown key" in told(
        path, environ={"TUNESMITH_LOOP__DEEP__EXTRA": "1"}
    )
    assert "--set: loop.extra: unknown key" in told(path, sets=["loop.extra=1"])
    assert "--flag: extra: unknown key" in told(path, overrides={"extra": (1, "--flag")})
    # Also where a higher layer throws the block away.
    assert "adapter.extra: unknown key" in told(run_yaml(good + "adapter: {extra: 1}"), sets=["adapter=full"])
    with pytest.raises(ValidationError):
        Root(model=Model(path="m"), extra=1)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("adapter: {rnak: 3}", "run.yaml:2: adapter.rnak: unknown key\nhint: did you mean adapter.rank?"),
        (
            "keep_bset: true",
            "run.yaml:2: keep_bset: unknown key\n"
            "hint: known here: model, adapter, second, optimizer, loop, share, tags",
        ),
        (
            "learning_rate: 1",
            "run.yaml:2: learning_rate: unknown key\nhint: did you mean optimizer.learning_rate?",
        ),
        ("rank: 3", "run.yaml:2: rank: unknown key\nhint: did you mean adapter.rank or second.rank?"),
        (
            "adapter.rank: 3",
            "run.yaml:2: adapter.rank: unknown key\n"
            "hint: a dot does not nest here: write adapter, and its keys indented below it",
        ),
        (
            "adapter: {kind: full, rank: 3}",
            "run.yaml:2: adapter.rank: adapter is full, and this key belongs to lora, dora",
        ),
        ("adapter: lroa", 'run.yaml:2: adapter: unknown kind "lroa"\nhint: did you mean lora?'),
        ("adapter:\n  kind: zzz", 'run.yaml:3: adapter: unknown kind "zzz"\nhint: kinds: lora, dora, full'),
        ("adapter: {rank: '16'}", 'run.yaml:2: adapter.rank: must be an integer ≥ 1 and ≤ 512, not "16"'),
        ("adapter: {rank: 0}", "run.yaml:2: adapter.rank: must be an integer ≥ 1 and ≤ 512, not 0"),
        ("adapter: {rank: 1.0}", "run.yaml:2: adapter.rank: must be an integer ≥ 1 and ≤ 512, not 1.0"),
        ("adapter: {rank: true}", "run.yaml:2: adapter.rank: must be an integer ≥ 1 and ≤ 512, not true"),
        ("adapter: {alpha: .inf}", "run.yaml:2: adapter.alpha: must be a number > 0, not Infinity"),
        (
            "adapter: {targets: q_proj}",
            'run.yaml:2: adapter.targets: must be all-linear or a list of text, not "q_proj"',
        ),
        ("adapter: [1]", "run.yaml:2: adapter: must be one of the kinds lora, dora, full, not [1]"),
        ("second: 3", "run.yaml:2: second: must be one of the kinds lora, full or null, not 3"),
        ("loop: {keep_best: 'no'}", 'run.yaml:2: loop.keep_best: must be true or false, not "no"'),
        (
            "adapter: {kind: full, layers: 13}",
            "run.yaml:2: adapter.layers: thirteen brings bad luck; it is 13",
        ),
        ("loop: 3", "run.yaml:2: loop: must be a mapping of keys, not 3"),
        ("loop: {validate_every: null}", "run.yaml:2: loop: keep_best needs validation: set validate_every"),
        ("model: {path: 5}", "run.yaml:1: model.path: must be text (at least 1 character), not 5"),
        ("model: {path: ''}", 'run.yaml:1: model.path: must be text (at least 1 character), not ""'),
        ("model: {path: m, quantize: 3}", "run.yaml:1: model.quantize: must be one of 4, 8 or null, not 3"),
        ("share: 2", "run.yaml:2: share: must be a number ≥ 0 and ≤ 1 or a list of text, not 2"),
        (
            "optimizer: {learning_rate: {a: 1}}",
            'run.yaml:2: optimizer.learning_rate: must be a number > 0, not {"a": 1}',
        ),
        ("tags: {a: 1}", 'run.yaml:2: tags: must be a mapping, not {"a": 1}'),
        (
            "model: {quantize: 4}",
            "model.path: missing; must be text (at least 1 character)\n"
            "hint: give --model MODEL, or add it to a file of settings",
        ),
    ],
)
def test_each_mistake_is_told_in_plain_words(run_yaml, text, message):
    assert told(run_yaml(text if text.startswith("model") else "model: {path: m}\n" + text)) == message


def test_all_mistakes_are_told_at_once(run_yaml):
    path = run_yaml("model: {pth: m}\nadapter: {rank: 0}\nloop: {keep_best: 1, deep: {low: x}}\n")
    assert told(path, sets=["share=-1"]) == (
        "6 problems in the settings:\n"
        "  run.yaml:1: model.pth: unknown key (did you mean model.path?)\n"
        "  run.yaml:2: adapter.rank: must be an integer ≥ 1 and ≤ 512, not 0\n"
        '  run.yaml:3: loop.deep.low: must be an integer, not "x"\n'
        "  run.yaml:3: loop.keep_best: must be true or false, not 1\n"
        "  --set: share: must be a number ≥ 0 and ≤ 1 or a list of text, not -1\n"
        "  model.path: missing; must be text (at least 1 character) "
        "(give --model MODEL, or add it to a file of settings)"
    )


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("TUNESMITH_ADAPTER__RNAK", "adapter.rnak: unknown key\nhint: did you mean adapter.rank?"),
        ("TUNESMITH_MODLE__PATH", "modle: unknown key\nhint: did you mean model?"),
        (
            "TUNESMITH_LEARNING_RATE",
            "learning_rate: unknown key\nhint: did you mean optimizer.learning_rate?",
        ),
        ("TUNESMITH_TAG", "tag: unknown key\nhint: did you mean tags?"),
    ],
)
def test_an_unknown_variable_is_refused_and_the_meant_key_named(run_yaml, variable, meant):
    assert told(run_yaml("model: {path: m}"), environ={variable: "3"}) == f"{variable}: {meant}"


def test_a_set_that_is_no_assignment_is_refused(run_yaml):
    path = run_yaml("model: {path: m}")
    assert (
        told(path, sets=["adapter.rank"])
        == '--set: must be key=value, not "adapter.rank"\nhint: for example --set adapter.rank=8'
    )
    assert told(path, sets=["model.path=*.jsonl"]).startswith("--set: not readable as YAML: ")


# --- for people and editors


def test_annotated_names_every_key_its_meaning_and_what_is_allowed(run_yaml):
    text = annotated(Root, {"model.path": "m", "adapter": {"kind": "dora", "rank": 4}})
    for lines in (
        "model:\n  # Where the weights are.\n  # text (at least 1 character); required\n  path: m\n",
        "# one of the kinds lora, dora, full; default lora\nadapter:\n  kind: dora\n",
        "  # Width of the update.\n  # an integer ≥ 1 and ≤ 512; default 16\n  rank: 4\n",
        "# Beside the first.\n# one of the kinds lora, full or null; default null\nsecond: null\n",
        "optimizer:\n  # one of adamw, lion; default adamw\n  kind: adamw\n",
    ):
        assert lines in text
    assert resolve(run_yaml(text)).spec == Root(model=Model(path="m"), adapter=DoRA(rank=4))


def test_annotated_leaves_what_is_required_to_be_filled_in(run_yaml):
    text = annotated(Root)
    assert "  # path:\n" in text
    assert told(run_yaml(text)).startswith("model.path: missing")
    assert resolve(run_yaml(text.replace("# path:", "path: m"))).spec == Root(model=Model(path="m"))
    with pytest.raises(ConfigError, match=r"^values: adapter\.rank: must be an integer"):
        annotated(Root, {"adapter.rank": 0})


def test_the_schema_takes_what_is_right_and_nothing_else():
    described = schema(Root)
    assert json.loads(json.dumps(described)) == described
    check = jsonschema.Draft202012Validator(described).is_valid
    for adapter in ({"kind": "full"}, {"rank": 3}, {"kind": "dora", "targets": ["k"]}):
        assert check({"model": {"path": "m"}, "adapter": adapter, "optimizer": {"kind": "lion"}})
    for adapter in ("fool", {"kind": "fool"}, {"rank": "3"}, {"rnak": 3}, {"rank": 0}):
        assert not check({"model": {"path": "m"}, "adapter": adapter})
    assert described["$defs"]["LoRA"]["properties"]["rank"] == {
        "default": 16,
        "description": "Width of the update.",
        "maximum": 512,
        "minimum": 1,
        "title": "Rank",
        "type": "integer",
    }
    assert described["additionalProperties"] is False


def test_presets_of_the_package_are_found_by_name():
    found = config.presets()
    assert "mistral-7b-m4-24gb" in found
    assert all(path.suffix == ".yaml" and path.is_file() for path in found.values())


def test_numbers_that_are_not_finite_are_no_settings():
    for value in (math.nan, math.inf):
        with pytest.raises(ValidationError):
            LoRA(alpha=value)
