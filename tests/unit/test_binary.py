"""Reading machine code: recorded, shortened disassembly of Triton 3.6.0 kernels."""

import pytest

from harness.binary import amdgcn_class, amdgcn_code, amdgcn_resources, code_hash, sass_class, sass_code
from harness.errors import MachineError
from harness.flow import Instruction, innermost_loops

# sm_90, copies by TMA: a loop that waits for a barrier; the spinning is behind the end and branches back into the loop.
HOPPER = """
.text.flash_fwd_kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   S2R R177, SR_TID.X ;
        /*0020*/               @P0 BRA `(.L_x_0) ;
        /*0030*/                   HGMMA.64x64x16.F32.BF16 R24, R92, gdesc[UR8], RZ, !UPT, gsb0 ;
.L_x_1:
        /*0040*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P2, [UR17], R4 ;
        /*0050*/              @!P2 BRA `(.L_x_2) ;
.L_x_4:
        /*0060*/                   WARPGROUP.ARRIVE ;
        /*0070*/                   HGMMA.64x64x16.F32.BF16 R24, R92, gdesc[UR8], RZ, !UPT, gsb0 ;
        /*0080*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0090*/                   FMNMX R5, R24, R25, !PT ;
        /*00a0*/                   SHFL.BFLY PT, R6, R5, 0x2, 0x1f ;
        /*00b0*/                   FFMA R7, R24, R3, -R6 ;
        /*00c0*/                   MUFU.EX2 R8, R7 ;
        /*00d0*/                   F2FP.BF16.F32.PACK_AB R9, R8, R7 ;
        /*00e0*/                   HGMMA.64x128x16.F32.BF16 R56, R24, gdesc[UR8].tnspB, R56, gsb0 ;
        /*00f0*/                   UTMALDG.2D [UR8], [UR4] ;
        /*0100*/                   UIADD3 UR4, UR4, 0x1, URZ ;
        /*0110*/                   SYNCS.ARRIVE.TRANS64.A1T0 RZ, [UR17], R4 ;
        /*0120*/              @!P1 BRA `(.L_x_1) ;
.L_x_0:
        /*0130*/                   STG.E.128 desc[UR12][R8.64], R4 ;
        /*0140*/                   EXIT ;
.L_x_2:
        /*0150*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P2, [UR17], R4 ;
        /*0160*/              @!P2 BRA `(.L_x_2) ;
        /*0170*/                   BRA `(.L_x_4) ;
.L_x_5:
        /*0180*/                   BRA `(.L_x_5);
"""

# sm_80: two loops one after the other inside an outer loop; the second spills.
AMPERE = """
.L_x_9:
        /*0000*/                   IMAD.SHL.U32 R0, R0, 0x40, RZ ;
.L_x_1:
        /*0010*/                   DEPBAR.LE SB0, 0x0 ;
        /*0020*/                   LDSM.16.M88.4 R4, [R0] ;
        /*0030*/                   HMMA.16816.F32.BF16 R44, R156.reuse, R164, RZ ;
        /*0040*/                   LDGSTS.E.BYPASS.LTC128B.128 [R1], desc[UR4][R2.64] ;
        /*0050*/                   LDGDEPBAR ;
        /*0060*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0070*/              @!P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0080*/                   LDL.LU R3, [R1+0x4] ;
        /*0090*/                   HMMA.1688.F32.TF32 R44, R156, R164, R44 ;
        /*00a0*/                   HMMA.16816.F32 R44, R156, R164, R44 ;
        /*00b0*/                   STL [R1+0x8], R3 ;
        /*00c0*/                   ISETP.GE.AND P0, PT, R3, R4, PT ;
        /*00d0*/               @P0 BRA `(.L_x_2) ;
        /*00e0*/              @!P3 BRA `(.L_x_9) ;
        /*00f0*/                   EXIT ;
"""

# sm_100 with specialized warps: partitions are reached through a register, the shape of products is in a descriptor.
BLACKWELL = """
        /*0000*/                   USETMAXREG.DEALLOC.CTAPOOL 0x18 ;
        /*0010*/                   BRX R4 -0x20 ;
.L_x_1:
        /*0020*/                   UTCHMMA gdesc[UR22], gdesc[UR20], tmem[UR12], tmem[UR32], idesc[UR33], !UPT ;
        /*0030*/                   UTCBAR [UR28], URZ ;
        /*0040*/                   BRA.U UP0, `(.L_x_1) ;
        /*0050*/                   EXIT ;
.L_x_2:
        /*0060*/                   LDTM.16dp32bit_t0_t15.x32 R8, tmem[UR11+0x100000] ;
        /*0070*/                   R2UR UR17, R37 ;
        /*0080*/                   BRA `(.L_x_2) ;
"""

AMD = """
small_forward:                          ; @small_forward
; %bb.11:
	s_load_dwordx2 s[2:3], s[0:1], 0x0
	s_branch .LBB0_0
.LBB0_0:
	buffer_load_dwordx4 v[2:5], v1, s[12:15], 0 offen
	s_cbranch_scc1 .LBB0_4
.LBB0_2:                                ; =>This Inner Loop Header: Depth=1
	.loc	1 19 16                         ; small_attention.py:19:16
	v_mfma_f32_32x32x8_bf16 a[16:31], v[22:23], v[40:41], 0
	v_mfma_f32_16x16x16_f16 a[0:3], v[22:23], v[40:41], a[0:3]
	v_accvgpr_read_b32 v15, a47
	v_exp_f32_e32 v10, v10
	v_pk_mul_f32 v[2:3], v[4:5], v[6:7] op_sel_hi:[0,1]
	v_fma_f32 v1, v2, v3, -v4
	v_max3_f32 v1, v2, v3, v4
	v_cvt_f32_u32_e32 v1, v2
	ds_bpermute_b32 v1, v2, v3
	ds_read_b128 v[2:5], v1
	ds_write_b64 v1, v[2:3]
	s_waitcnt lgkmcnt(0)
	s_barrier
	buffer_load_dword v4, s[8:11], 0 offen lds
	scratch_load_dword v1, off, off offset:4
	s_cbranch_scc1 .LBB0_2
.LBB0_4:
	buffer_store_dwordx4 v[2:5], v1, s[12:15], 0 offen
	s_endpgm
.Lfunc_end0:
  - .agpr_count:     48
    .private_segment_fixed_size: 12
    .vgpr_count:     228
    .vgpr_spill_count: 0
"""


def test_a_hopper_loop_is_read_with_its_shapes() -> None:
    code = sass_code(HOPPER)
    (loop,) = code.loops
    # One of four warps that share 64x64x16 and 64x128x16 products.
    assert loop.matrix_flops == 2 * 64 * 16 * (64 + 128) // 4
    expected = {
        "wait": 3, "branch": 4, "other": 1, "matrix": 2, "alu": 1, "shuffle": 1, "fma": 1, "special": 1, "convert": 1,
        "tma": 1, "uniform": 1, "barrier": 1,
    }  # fmt: skip
    assert loop.instructions == expected
    assert code.instructions["matrix"] == 3
    assert code.instructions["global_store"] == 1


def test_code_behind_the_end_is_no_loop_of_its_own() -> None:
    # A reader that took every backward branch for a loop would find one from the spinning into the middle of the loop.
    (loop,) = sass_code(HOPPER).loops
    assert "global_store" not in loop.instructions


def test_innermost_loops_come_in_code_order() -> None:
    plain, masked = sass_code(AMPERE).loops
    assert plain.matrix_flops == 2 * 16 * 8 * 16
    assert masked.matrix_flops == 2 * 16 * 8 * (8 + 16)
    assert plain.instructions == {
        "wait": 1, "shared_load": 1, "matrix": 1, "async_copy": 1, "other": 1, "barrier": 1, "branch": 1
    }  # fmt: skip
    assert masked.instructions["local_load"] == masked.instructions["local_store"] == 1
    assert masked.instructions["alu"] == 1


def test_partitions_reached_through_a_register_are_seen() -> None:
    code = sass_code(BLACKWELL)
    assert code.instructions["setmaxreg"] == 1
    assert code.instructions["tensor_memory"] == 1
    (loop,) = code.loops
    assert loop.instructions == {"matrix": 1, "barrier": 1, "branch": 1}
    assert loop.matrix_flops == 0


def test_a_branch_may_be_conditional_by_an_operand() -> None:
    text = """
.L_x_1:
        /*0000*/                   HMMA.16816.F32.BF16 R44, R156, R164, RZ ;
        /*0010*/                   BRA.U !UP0, `(.L_x_3) ;
        /*0020*/                   FFMA R7, R24, R3, -R6 ;
        /*0030*/                   BRA `(.L_x_1) ;
.L_x_3:
        /*0040*/                   EXIT ;
"""
    assert [loop.instructions for loop in sass_code(text).loops] == [{"matrix": 1, "branch": 2, "fma": 1}]


def test_loops_without_matrix_units_count_by_their_arithmetic() -> None:
    body = "".join(f"        /*{16 * i:04x}*/                   FFMA R{i}, R1, R2, R{i} ;\n" for i in range(128))
    text = f".L_x_0:\n{body}        /*0800*/              @!P0 BRA `(.L_x_0) ;\n        /*0810*/                   EXIT ;\n"
    assert [loop.instructions for loop in sass_code(text).loops] == [{"fma": 128, "branch": 1}]
    fewer = text.replace("FFMA R5, R1, R2, R5", "MOV R5, R1")
    assert sass_code(fewer).loops == ()


@pytest.mark.parametrize(
    ("opcode", "kind"),
    [
        ("LDS", "shared_load"), ("STSM", "shared_store"), ("LD", "global_load"), ("LDC", "other"), ("ULDC", "uniform"),
        ("LDCU", "uniform"), ("MUFU", "special"), ("FADD2", "fma"), ("FFMA2", "fma"), ("IMAD", "alu"), ("FSEL", "alu"),
        ("FMNMX3", "alu"), ("F2FP", "convert"), ("I2FP", "convert"), ("UBLKCP", "tma"), ("UTMASTG", "tma"),
        ("UTMACMDFLUSH", "wait"), ("REDG", "atomic"), ("ATOMG", "atomic"), ("REDUX", "shuffle"), ("QMMA", "matrix"),
        ("QGMMA", "matrix"), ("UTCQMMA", "matrix"), ("USETMAXREG", "setmaxreg"), ("BRA", "branch"), ("BAR", "barrier"),
    ],
)  # fmt: skip
def test_opcodes_have_a_class(opcode: str, kind: str) -> None:
    assert sass_class(opcode) == kind


def test_an_amd_loop_is_read_with_its_shapes() -> None:
    code = amdgcn_code(AMD)
    (loop,) = code.loops
    assert loop.matrix_flops == 2 * 32 * 32 * 8 + 2 * 16 * 16 * 16
    assert loop.instructions == {
        "matrix": 2, "alu": 2, "special": 1, "fma": 2, "convert": 1, "shuffle": 1, "shared_load": 1, "shared_store": 1,
        "wait": 1, "barrier": 1, "async_copy": 1, "local_load": 1, "branch": 1,
    }  # fmt: skip
    assert code.instructions["global_load"] == code.instructions["global_store"] == 1
    assert amdgcn_resources(AMD) == (228, 12)


def test_amd_instructions_have_a_class() -> None:
    assert amdgcn_class("global_atomic_add_f32") == "atomic"
    assert amdgcn_class("v_add_u32_e32") == "alu"
    assert amdgcn_class("v_add_f32_e32") == "fma"
    assert amdgcn_class("s_cbranch_execz") == "branch"
    assert amdgcn_class("s_add_i32") == "uniform"


def test_an_assembly_without_resources_is_refused() -> None:
    with pytest.raises(MachineError, match="register count"):
        amdgcn_resources("\ts_endpgm\n")


def test_the_hash_names_code_and_launch() -> None:
    text = b"\x00\x01"
    names = {code_hash(text, shared_bytes=1024, warps=4), code_hash(text, shared_bytes=2048, warps=4)}
    names |= {code_hash(text, shared_bytes=1024, warps=8), code_hash(b"\x00\x02", shared_bytes=1024, warps=4)}
    assert len(names) == 4
    assert code_hash(text, shared_bytes=1024, warps=4) in names


def test_an_irreducible_cycle_is_no_natural_loop() -> None:
    # Two entries: neither block dominates the other, so neither heads a loop.
    code = [Instruction("branch", targets=("b",)), Instruction("matrix"), Instruction("matrix", targets=("a",))]
    assert innermost_loops(code, {"a": 1, "b": 2}, wanted=lambda counts: True) == []


def test_code_without_any_instruction_has_no_loops() -> None:
    assert innermost_loops([], {}, wanted=lambda counts: True) == []
