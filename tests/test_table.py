"""Key tables: each word of their vocabulary, strictness, and every table that ships."""

import importlib.resources

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqxdiff._errors import CheckpointError
from eqxdiff.checkpoint import Table, check, export_infos, export_tensors, load_module, read_table
from eqxdiff.tensors import InMemory


def skeleton(**shapes):
    """A PyTree with a float32 leaf for each path; dots become nested dictionaries."""
    tree: dict = {}
    for path, shape in shapes.items():
        *parents, last = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = jax.ShapeDtypeStruct(shape, jnp.float32)
    return tree


def arrays(**shapes):
    """Different numbers in each tensor."""
    random = np.random.RandomState(0)
    return {name: random.standard_normal(shape).astype("f4") for name, shape in shapes.items()}


def flat(tree):
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {".".join(key.key for key in path): np.asarray(leaf) for path, leaf in paths}


def round_trip(table, file, skeleton):
    """Loads, exports, compares what is written with the file, and returns the leaves."""
    table = Table.parse(table)
    check({name: array.shape for name, array in file.items()}, table, skeleton)
    module = load_module(InMemory(file), table, skeleton)
    written = dict(export_tensors(module, table))
    assert {name: info.shape for name, info in export_infos(skeleton, table).items()} == {
        name: array.shape for name, array in written.items()
    }
    for name, array in written.items():
        np.testing.assert_array_equal(array, file[name])
    return flat(module), set(written)


def test_a_leaf_with_the_name_of_a_tensor_needs_no_row():
    file = arrays(**{"a.b": (2, 3), "c": ()})
    leaves, written = round_trip("", file, skeleton(**{"a.b": (2, 3), "c": ()}))
    np.testing.assert_array_equal(leaves["a.b"], file["a.b"])
    assert leaves["c"] == file["c"]
    assert written == set(file)


def test_rename_from_the_start_and_anywhere():
    table = """
    [rename]
    "net.*.out" = "model.*.to_out.0"
    ".norm" = ".ln"
    """
    file = arrays(**{"model.3.to_out.0.ln.weight": (2,), "norm.weight": (2,), "x.net.1.out": (1,)})
    file["ln.weight"] = file.pop("norm.weight")
    want = skeleton(**{"net.3.out.norm.weight": (2,), "norm.weight": (2,), "x.net.1.out": (1,)})
    leaves, _ = round_trip(table, file, want)
    np.testing.assert_array_equal(
        leaves["net.3.out.norm.weight"], file["model.3.to_out.0.ln.weight"]
    )


def test_a_segment_is_renamed_once_and_the_first_row_has_it():
    table = """
    [rename]
    "a.b" = "b.c"
    ".b" = ".z"
    ".c" = ".y"
    """
    _, written = round_trip(table, arrays(**{"b.c.y": (1,)}), skeleton(**{"a.b.c": (1,)}))
    assert written == {"b.c.y"}


def test_aliases_are_read_in_any_spelling_and_written_in_the_first():
    table = Table.parse('[rename]\n"shared" = ["shared", "encoder.embed", ""]')
    want = skeleton(**{"shared.weight": (2,)})
    for name in ("shared.weight", "encoder.embed.weight", "weight"):
        file = arrays(**{name: (2,)})
        module = load_module(InMemory(file), table, want)
        np.testing.assert_array_equal(module["shared"]["weight"], file[name])
        assert [name for name, _ in export_tensors(module, table)] == ["shared.weight"]


def test_two_spellings_in_one_file_must_agree():
    table = Table.parse('[rename]\n"shared" = ["shared", "embed"]')
    want = skeleton(**{"shared.weight": (2, 3)})
    file = arrays(**{"embed.weight": (2, 3)})
    file["shared.weight"] = file["embed.weight"].copy()
    load_module(InMemory(file), table, want)
    file["embed.weight"][1, 2] += 1
    with pytest.raises(CheckpointError, match=r"embed.weight and shared.weight should be equal"):
        load_module(InMemory(file), table, want)


def test_prefixes_are_alternatives():
    table = Table.parse('prefix = ["model.net", ""]')
    want = skeleton(**{"a.b": (2,)})
    for name in ("model.net.a.b", "a.b"):
        load_module(InMemory(arrays(**{name: (2,)})), table, want)


def test_stack_puts_the_layer_into_the_name():
    file = arrays(**{f"enc.blocks.{i}.w": (2, 3) for i in range(11)})
    leaves, written = round_trip(
        'stack = [".blocks"]', file, skeleton(**{"enc.blocks.w": (11, 2, 3)})
    )
    for i in range(11):
        np.testing.assert_array_equal(leaves["enc.blocks.w"][i], file[f"enc.blocks.{i}.w"])
    assert written == set(file)


def test_split_cuts_a_fused_tensor_by_the_sizes_of_the_leaves():
    table = """
    stack = ["blocks"]
    [split]
    "layers.*.linear1" = ["blocks.*.q", "blocks.*.mlp"]
    """
    file = arrays(**{"layers.0.linear1.weight": (7, 3), "layers.1.linear1.weight": (7, 3)})
    want = skeleton(**{"blocks.q.weight": (2, 2, 3), "blocks.mlp.weight": (2, 5, 3)})
    leaves, _ = round_trip(table, file, want)
    np.testing.assert_array_equal(
        leaves["blocks.mlp.weight"][1], file["layers.1.linear1.weight"][2:]
    )


def test_split_can_swap_the_halves_of_one_leaf():
    file = arrays(**{"mod.weight": (4, 3)})
    table = '[split]\n"mod" = ["norm.linear[2/2]", "norm.linear[1/2]"]'
    leaves, _ = round_trip(table, file, skeleton(**{"norm.linear.weight": (4, 3)}))
    np.testing.assert_array_equal(
        leaves["norm.linear.weight"], np.roll(file["mod.weight"], 2, axis=0)
    )


def test_split_and_rename_combine():
    table = """
    stack = ["encoder.layers"]
    [rename]
    "encoder.layers" = "transformer.resblocks"
    [split]
    ".attn.in_proj_weight" = [".self_attn.q.weight", ".self_attn.k.weight"]
    ".attn.in_proj_bias" = [".self_attn.q.bias", ".self_attn.k.bias"]
    """
    name = "transformer.resblocks.0.attn.in_proj"
    file = arrays(**{f"{name}_weight": (4, 2), f"{name}_bias": (4,)})
    leaf = "encoder.layers.self_attn"
    want = skeleton(
        **{f"{leaf}.q.weight": (1, 2, 2), f"{leaf}.k.weight": (1, 2, 2)},
        **{f"{leaf}.q.bias": (1, 2), f"{leaf}.k.bias": (1, 2)},
    )
    leaves, _ = round_trip(table, file, want)
    np.testing.assert_array_equal(leaves[f"{leaf}.k.bias"][0], file[f"{name}_bias"][2:])


def test_concat_joins_tensors_in_a_leaf():
    file = arrays(**{"gate.weight": (2, 3), "value.weight": (2, 3)})
    table = '[concat]\n"proj" = ["gate", "value"]'
    leaves, _ = round_trip(table, file, skeleton(**{"proj.weight": (4, 3)}))
    np.testing.assert_array_equal(leaves["proj.weight"][2:], file["value.weight"])


def test_transpose_reshape_and_scale():
    table = """
    [transpose]
    "conv.weight" = [3, 2, 0, 1]
    [reshape]
    ".q.weight" = [0, 0, 1, 1]
    [scale]
    "gain" = 0.25
    """
    file = arrays(**{"conv.weight": (3, 2, 5, 4), "a.q.weight": (2, 3, 1, 1), "gain": (2,)})
    want = skeleton(**{"conv.weight": (4, 5, 3, 2), "a.q.weight": (2, 3), "gain": (2,)})
    leaves, _ = round_trip(table, file, want)
    np.testing.assert_array_equal(leaves["conv.weight"], file["conv.weight"].transpose(3, 2, 0, 1))
    np.testing.assert_array_equal(leaves["a.q.weight"], file["a.q.weight"][:, :, 0, 0])
    np.testing.assert_array_equal(leaves["gain"], file["gain"] / 4)


def test_optional_leaves_are_filled_and_dropped_tensors_ignored():
    table = Table.parse('drop = [".position_ids", "ema.*.w"]\n[optional]\n"a.bias" = 0.5')
    file = arrays(**{"a.weight": (2,), "x.position_ids": (1,), "ema.3.w": (1,)})
    module = load_module(InMemory(file), table, skeleton(**{"a.weight": (2,), "a.bias": (2, 3)}))
    np.testing.assert_array_equal(module["a"]["bias"], np.full((2, 3), 0.5, "f4"))
    file |= arrays(**{"a.bias": (2, 3)})
    module = load_module(InMemory(file), table, skeleton(**{"a.weight": (2,), "a.bias": (2, 3)}))
    np.testing.assert_array_equal(module["a"]["bias"], file["a.bias"])


def problems(file, table, want):
    shapes = {name: array.shape for name, array in file.items()}
    with pytest.raises(CheckpointError) as error:
        check(shapes, Table.parse(table), want, name="transformer")
    with pytest.raises(CheckpointError) as loading:
        load_module(InMemory(file), Table.parse(table), want, name="transformer")
    assert str(loading.value) == str(error.value)
    return str(error.value).splitlines()[1:]


def test_every_problem_is_in_one_message():
    file = arrays(**{"a": (2,), "c.x": (1,), "c.y": (1,)})
    assert problems(file, "", skeleton(a=(3,), b=(1,))) == [
        "  missing: b",
        "  left over: c.* (2 tensors)",
        "  wrong shape: a is (2,), not (3,)",
    ]


def test_missing_and_superfluous_layers_are_named_together():
    names = [f"blocks.{i}.{leaf}" for i in range(8) for leaf in ("w", "b")]
    file = arrays(**{name: (2,) for name in names if not name.startswith(("blocks.2", "blocks.4"))})
    want = skeleton(**{"blocks.w": (6, 2), "blocks.b": (6, 2)})
    assert problems(file, 'stack = ["blocks"]', want) == [
        "  missing: blocks.{2, 4}.* (4 tensors)",
        "  left over: blocks.{6-7}.* (4 tensors)",
    ]


def test_layers_of_one_wrong_shape_share_a_line():
    file = arrays(**{f"blocks.{i}.w": (2,) for i in range(4)})
    assert problems(file, 'stack = ["blocks"]', skeleton(**{"blocks.w": (4, 3)})) == [
        "  wrong shape: blocks.{0-3}.w (4 tensors) is (2,), not (3,)"
    ]


def test_a_long_list_is_cut():
    lines = problems(arrays(**{f"x{i}": (1,) for i in range(99)}), "", skeleton())
    assert len(lines) == 12
    assert lines[-1].endswith("and 88 more such lines")


@pytest.mark.parametrize(
    ("table", "match"),
    [
        ("rename = 3", "rename"),
        ("[renames]", "renames: unknown"),
        ('[rename]\n"a.*" = "b"', "stars"),
        ('[rename]\n".a" = "b"', "leading dot"),
        ('stack = ["a..b"]', "empty segment"),
        ('[split]\n"a" = ["b[3/2]"]', "no part 3 of 2"),
        ('[transpose]\n"a" = [0, 2]', "order of axes"),
        ('[scale]\n"a" = "b"', "not a number"),
        ("a =", "Invalid value"),
    ],
)
def test_a_faulty_table_is_a_value_error(table, match):
    with pytest.raises(ValueError, match=match):
        Table.parse(table)


@pytest.mark.parametrize(
    ("table", "leaves"),
    [
        ('[rename]\n"a" = "b"', {"a": (2,), "b": (2,)}),  # b is used twice
        ('[split]\n"f" = ["a[1/2]", "b"]', {"a": (2,), "b": (2,)}),  # half of a is never set
        ('[split]\n"f" = ["a", "b"]', {"a": (2,)}),  # there is no leaf b
        ('[split]\n"f" = ["a", "b"]', {"a": (2, 3), "b": (2, 4)}),
        ('[split]\n"f" = ["a[1/2]", "a[2/2]"]', {"a": (3,)}),
        ('[transpose]\n"a" = [1, 0]', {"a": (3,)}),
        ('[reshape]\n"a" = [5, -1]', {"a": (3,)}),
        ('[reshape]\n"a" = [-1, 0]', {"a": (3,)}),
    ],
)
def test_a_table_that_does_not_cover_the_model_is_a_value_error(table, leaves):
    with pytest.raises(ValueError, match=r"table\.toml"):
        export_infos(skeleton(**leaves), Table.parse(table))


def test_static_fields_and_other_leaves_are_kept():
    class Net(eqx.Module):
        weight: jax.Array
        bias: jax.Array | None
        blocks: tuple
        eps: float = eqx.field(static=True)

    make = lambda: Net(jnp.ones(2), None, (jnp.ones(3), 7), 0.125)
    skeleton = eqx.filter_eval_shape(make)
    module = load_module(
        InMemory(arrays(**{"weight": (2,), "blocks.0": (3,)})), Table.parse(""), skeleton
    )
    assert isinstance(module, Net)
    assert (module.bias, module.blocks[1], module.eps) == (None, 7, 0.125)
    assert isinstance(module.weight, jax.Array)


def test_every_table_that_ships_can_be_read():
    folder = importlib.resources.files("eqxdiff.weights_map")
    names = [file.name.removesuffix(".toml") for file in folder.iterdir() if ".toml" in file.name]
    assert "flux1_transformer" in names
    for name in names:
        assert read_table(name).name == name


def test_an_unknown_table_is_a_value_error():
    with pytest.raises(ValueError, match="no table"):
        read_table("nonsense")
