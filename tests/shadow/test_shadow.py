"""Every rule of the watch on small kernels: what it must find, where, and what it must not."""

import pytest

# scenario: (kind, tensor) of all findings, with those after the last launch ("never written").
WANTED = {
    "right": (),
    "right_bf16": (),
    "load_beyond_the_end": (("out of bounds load", "x"),),
    "load_before_the_start": (("out of bounds load", "x"),),
    "store_beyond_the_end": (("out of bounds store", "y"),),
    "load_gigabytes_away": (("out of bounds load", "x"),),
    "load_between_rows": (("out of bounds load", "x"),),
    "rows_with_padding_are_right": (),
    "expanded_rows_are_right": (),
    "load_from_the_neighbour": (("wrong tensor", "x"),),
    "atomic_beyond_the_end": (("out of bounds atomic", "y"),),
    "atomics_of_all_programs_are_right": (),
    "atomic_on_what_was_never_written": (("uninitialised read", "y"), ("never written", "y")),
    "compare_and_swap_beyond_the_end": (("out of bounds atomic", "y"),),
    "pointers_in_a_table_are_right": (),
    "a_pointer_in_a_table_is_wrong": (("out of bounds load", ""),),
    "descriptors_are_right": (),
    "a_descriptor_is_too_long": (("out of bounds load", "x"), ("out of bounds store", "y")),
    "a_descriptor_of_the_host_is_right": (),
    "output_read_before_it_is_written": (("uninitialised read", "y"),),
    "output_read_after_the_host_wrote_it_is_right": (),
    "output_not_all_written": (("never written", "y"),),
    "workspace_of_an_earlier_launch_is_right": (),
    "workspace_not_all_written": (("uninitialised read", "work"),),
    "input_written": (("input written", "x"),),
    "input_written_through_an_output": (("input written", "y"),),
    "read_of_a_foreign_write": (("read of foreign write", "y"),),
    "write_after_a_foreign_read": (("write after foreign read", "y"),),
    "write_after_many_reads": (("write after foreign read", "y"),),
    "two_programs_write_the_same": (("double write", "y"),),
    "two_programs_write_different_numbers": (("write race", "y"),),
    "two_programs_add_with_plain_stores": (
        ("read of foreign write", "y"), ("write race", "y"), ("write after foreign read", "y"),
    ),
    "plain_store_before_an_atomic": (("atomic mixed with plain", "y"),),
    "plain_store_after_atomics": (("atomic mixed with plain", "y"),),
    "plain_load_after_atomics": (("atomic mixed with plain", "y"),),
    "plain_load_after_own_atomic_is_right": (),
    "lanes_store_different_numbers": (("conflicting lanes", "y"), ("never written", "y")),
    "lanes_store_the_same_number": (("never written", "y"),),
    "offset_overflows": (("int32 overflow", ""), ("never written", "y")),
    "offset_just_fits": (("never written", "y"),),
    "assertion_fails": (("device assert", ""), ("never written", "y")),
    "assertion_holds": (("never written", "y"),),
    "assumption_is_false": (("device assert", ""), ("never written", "y")),
    "words_of_two_elements_are_right": (),
    "words_of_two_elements_beyond_the_end": (("out of bounds load", "x"), ("out of bounds store", "y")),
    "one_load_from_two_tensors_is_right": (),
    "one_load_from_two_tensors_beyond_one": (("out of bounds load", "other"),),
    "refused_integers_do_not_run_loops": (("out of bounds load", "x"),),
    "random_numbers_are_right": (),
    "tensors_nobody_named_are_checked": (("out of bounds store", "y"),),
    "part_of_a_tensor_is_given": (("input written", "x"),),
    "the_limit_holds": (("input written", "x"),),
    "a_kernel_that_raises": (("out of bounds load", "x"), ("never written", "y")),
    "refusals": (),
    "plain_load_after_atomic_loads_and_stores": (("atomic mixed with plain", "y"),),
    "load_between_rows_only": (("out of bounds load", "x"),),
    "a_word_reaches_between_rows": (("out of bounds load", "x"),),
    "a_word_reaches_beyond_the_end": (("out of bounds load", "x"),),
    "load_across_elements": (("out of bounds load", "x"), ("never written", "y")),
    "upper_halves_of_words_differ": (("double write", "y"), ("write race", "y"), ("never written", "y")),
    "large_elements_named_before_small_ones": (),
    "a_descriptor_that_is_not_aligned": (("never written", "y"),),
    "exchanging_is_writing": (),
    "exchange_after_a_foreign_write": (("atomic mixed with plain", "y"), ("never written", "y")),
    "exchange_after_a_foreign_read": (("atomic mixed with plain", "y"),),
    "words_do_not_differ": (("double write", "y"), ("never written", "y")),
    **{f"{end} {name} fits": () for end in ("upper", "lower") for name in ("sum", "difference", "product")},
    **{
        f"{end} {name} overflows": (("int32 overflow", ""),)
        for end in ("upper", "lower") for name in ("sum", "difference", "product")
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def scenarios(report):
    return {line["scenario"]: line for line in report("small.py")}


def first(found, kind):
    return next(finding for finding in [*found["findings"], *found["unwritten"]] if finding["kind"] == kind)


@pytest.mark.parametrize("name", WANTED)
def test_what_is_found(scenarios, name):
    found = scenarios[name]
    if "skipped" in found:
        pytest.skip(found["skipped"])
    assert {(one["kind"], one["tensor"]) for one in [*found["findings"], *found["unwritten"]]} == set(WANTED[name])


def test_no_scenario_is_forgotten(scenarios):
    assert set(scenarios) == set(WANTED)


def test_the_line_is_that_of_the_access(scenarios):
    marked = {name: found for name, found in scenarios.items() if found.get("line")}
    for name, found in marked.items():
        lines = {finding["line"] for finding in found["findings"]}
        assert not lines or found["line"] in lines, name
    assert sum(bool(found["findings"]) for found in marked.values()) >= 20


@pytest.mark.parametrize(
    ("name", "kind", "index", "offset", "program", "count"),
    [
        ("load_beyond_the_end", "out of bounds load", None, 160, [2, 0, 0], 8),
        ("load_before_the_start", "out of bounds load", None, -4, [0, 0, 0], 1),
        ("load_gigabytes_away", "out of bounds load", None, 4 * 1000000007, [0, 0, 0], 39),
        ("load_between_rows", "out of bounds load", None, 24, [0, 0, 0], 4),
        ("load_from_the_neighbour", "wrong tensor", None, 160, [2, 0, 0], 8),
        ("workspace_not_all_written", "uninitialised read", [33], 132, [2, 0, 0], 7),
        ("two_programs_write_the_same", "double write", [14], 56, [1, 0, 0], 4),
        ("write_after_a_foreign_read", "write after foreign read", [16], 64, [1, 0, 0], 2),
        ("output_not_all_written", "never written", [33], 132, [0, 0, 0], 7),
    ],
)
def test_where_it_is_found(scenarios, name, kind, index, offset, program, count):
    finding = first(scenarios[name], kind)
    assert (finding["index"], finding["offset"], finding["program"], finding["count"]) == (
        index,
        offset,
        program,
        count,
    )


def test_who_the_other_was(scenarios):
    assert first(scenarios["two_programs_write_the_same"], "double write")["detail"] == "with program (0, 0, 0)"
    assert first(scenarios["write_after_many_reads"], "write after foreign read")["detail"] == "with several programs"
    assert first(scenarios["load_from_the_neighbour"], "wrong tensor")["detail"] == "load in other"


def test_refused_stores_reach_no_memory(scenarios):
    for name in ("store_beyond_the_end", "atomic_beyond_the_end", "compare_and_swap_beyond_the_end"):
        assert scenarios[name]["intact"], name
    assert scenarios["store_beyond_the_end"]["y"] == [float(value) for value in range(1, 41)]
    assert scenarios["input_written"]["intact"] is False


def test_refused_loads_give_nan(scenarios):
    assert scenarios["load_before_the_start"]["y"][:2] == [None, 1.0]


def test_one_load_may_reach_two_tensors(scenarios):
    right = [float(at if at % 2 else -at) for at in range(1, 41)]
    assert scenarios["one_load_from_two_tensors_is_right"]["y"] == right
    refused = [None if at > 36 and at % 2 == 0 else value for at, value in enumerate(right, start=1)]
    assert scenarios["one_load_from_two_tensors_beyond_one"]["y"] == refused


def test_refused_integers_are_no_length_and_no_index(scenarios):
    assert scenarios["refused_integers_do_not_run_loops"]["y"] == [-1] * 40


def test_findings_beyond_the_limit_are_counted(scenarios):
    assert len(scenarios["the_limit_holds"]["findings"]) == 1
    assert scenarios["the_limit_holds"]["dropped"] == 3


def test_the_interpreter_is_restored_when_a_kernel_raises(scenarios):
    found = scenarios["a_kernel_that_raises"]
    assert "broken on purpose" in found["raised"]
    assert found["changed"], "otherwise there was nothing to restore"
    assert found["restored"]


def test_addresses_keep_their_alignment(scenarios):
    assert "16-byte aligned" in scenarios["a_descriptor_that_is_not_aligned"]["raised"]


def test_what_cannot_be_watched_is_refused(scenarios):
    found = scenarios["refusals"]
    assert found["nested"].startswith("MachineError: the interpreter is being watched already")
    assert "`x`" in found["no_role"]
    assert "did you mean `input`?" in found["no_such_role"]
    assert "on the CPU, found meta" in found["elsewhere"]
