//! The rule for arm64.
//!
//! What kernels do with the instruction under a breakpoint (arch/arm64/kernel/probes/decode-insn.c,
//! `arm_probe_decode_insn` and `aarch64_insn_is_steppable`):
//!
//! | instruction | 5.10 to 7.2 |
//! |---|---|
//! | `b`, `bl`, `b.cond`, `cbz`, `cbnz`, `tbz`, `tbnz`, `br`, `blr`, `ret`, `adr`, `adrp` | simulated |
//! | `nop` | single-stepped before 6.13, then simulated (commit ac4ad5c09b34a) |
//! | `bti`, `paciasp` and the other hints for pointer authentication | single-stepped (since 5.8; refused before) |
//! | other hints, `msr`, exclusive loads and stores, exceptions | refused: attaching fails |
//! | loads of literals | refused since 6.12 and the stable kernels of then (commit acc450aa07099); wrong before |
//! | all others | single-stepped |
//!
//! Instructions are 4 bytes each, so boundaries are plain. What an instruction writes is read off its encoding (Arm
//! Architecture Reference Manual, C4.1) for the kinds that functions start with; any other ends the search. The return
//! address is in x30: it may neither be signed nor, when the return is probed, stored before the probe, because the
//! return probe puts its own address into the register.

use super::{MAX_WHOLE_FUNCTION, Needs, Placement, Reason};

const LINK_REGISTER: u32 = 30;
const STACK_POINTER: u32 = 31;

/// What the search needs to know of an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// The kernel simulates it.
    Simulated,
    /// It goes on to the next one.
    Passes {
        /// Bit n: x`n` is written, or may be.
        written: u32,
        /// Bit n: x`n` is stored.
        stored: u32,
        /// How far it moves the stack pointer down, bytes.
        growth: u64,
    },
    /// The next one need not follow.
    EndsBlock,
    /// It moves the stack pointer by an unknown or upward distance.
    MovesStack,
    /// Anything else.
    Unknown,
}

pub(super) fn place(code: &[u8], needs: Needs) -> Placement {
    let mut sp_offset = 0;
    let mut offset = 0;
    let reason = loop {
        if needs.returns && sp_offset != 0 {
            break Reason::StackMoved;
        }
        let at = usize::try_from(offset).unwrap_or(usize::MAX);
        let word = match code.get(at..).unwrap_or_default() {
            [] => break Reason::BlockEnded,
            [a, b, c, d, ..] => u32::from_le_bytes([*a, *b, *c, *d]),
            _ => break Reason::Undecodable,
        };
        match kind(word) {
            Kind::Simulated => match obstacle(code, offset) {
                None => return Placement::emulated(offset, sp_offset),
                Some(reason) => break reason,
            },
            Kind::Passes { written, stored, growth } => {
                if written & u32::from(needs.arguments & 0x3f) != 0 {
                    break Reason::Clobbered;
                }
                let link = 1 << LINK_REGISTER;
                if written & link != 0 || needs.returns && stored & link != 0 {
                    break Reason::StackMoved;
                }
                sp_offset += growth;
            }
            Kind::EndsBlock => break Reason::BlockEnded,
            Kind::MovesStack => break Reason::StackMoved,
            Kind::Unknown => break Reason::Unknown,
        }
        offset += 4;
    };
    Placement::entry(reason)
}

fn kind(word: u32) -> Kind {
    let (rd, rn, rt2) = (word & 31, word >> 5 & 31, word >> 10 & 31);
    // Number 31 is no register in what `writes` is asked about.
    let register = |n: u32| if n == 31 { 0 } else { 1 << n };
    let writes = |written: u32| Kind::Passes { written, stored: 0, growth: 0 };
    if is_simulated(word) {
        return Kind::Simulated;
    }
    match word >> 25 & 0xf {
        // Data processing with an immediate. Additions without flags and logic without flags write the stack pointer
        // where others write nothing.
        0b1000 | 0b1001 => {
            let group = word >> 23 & 7;
            let sets_flags = if group == 0b100 { word >> 29 & 3 == 3 } else { word >> 29 & 1 == 1 };
            let adds = group == 0b010;
            if rd == STACK_POINTER && (adds || group == 0b100) && !sets_flags {
                let immediate = u64::from(word >> 10 & 0xfff) << if word >> 22 & 1 == 1 { 12 } else { 0 };
                let subtracts = adds && word >> 30 == 0b11 && rn == STACK_POINTER;
                return if subtracts {
                    Kind::Passes { written: 0, stored: 0, growth: immediate }
                } else {
                    Kind::MovesStack
                };
            }
            // Tagged additions and whatever else is newer than this table.
            if group == 0b011 { Kind::Unknown } else { writes(register(rd)) }
        }
        // Addition of an extended register without flags: the other writer of the stack pointer.
        0b0101 | 0b1101 if rd == STACK_POINTER && word & 0x3f20_0000 == 0x0b20_0000 => Kind::MovesStack,
        // Data processing with registers, vectors and floating point: what they write is at rd, if anything.
        0b0101 | 0b1101 | 0b0111 | 0b1111 => writes(register(rd)),
        0b1010 | 0b1011 => system(word),
        0b0100 | 0b0110 | 0b1100 | 0b1110 => load_or_store(word, [rd, rn, rt2].map(|n| (n, register(n)))),
        _ => Kind::Unknown,
    }
}

/// True when every supported kernel simulates it and it is not a call or a computed jump.
fn is_simulated(word: u32) -> bool {
    word & 0xfc00_0000 == 0x1400_0000 // b
        || word & 0xff00_0010 == 0x5400_0000 // b.cond
        || word & 0x7e00_0000 == 0x3400_0000 // cbz, cbnz
        || word & 0x7e00_0000 == 0x3600_0000 // tbz, tbnz
        || word & 0x1f00_0000 == 0x1000_0000 // adr, adrp
}

/// Hints, system registers, exceptions and the remaining branches.
fn system(word: u32) -> Kind {
    const HINT: u32 = 0xd503_201f;
    if word & 0xffff_f01f == HINT {
        return match word >> 5 & 0x7f {
            // nop; bti, bti c, bti j, bti jc
            0 | 32 | 34 | 36 | 38 => Kind::Passes { written: 0, stored: 0, growth: 0 },
            // paciaz, paciasp, pacibz, pacibsp sign the return address.
            24..=27 => Kind::Passes { written: 1 << LINK_REGISTER, stored: 0, growth: 0 },
            _ => Kind::Unknown,
        };
    }
    match word >> 20 {
        // mrs
        0xd53 => Kind::Passes { written: if word & 31 == 31 { 0 } else { 1 << (word & 31) }, stored: 0, growth: 0 },
        // The other system instructions.
        0xd50..=0xd55 => Kind::Unknown,
        _ => Kind::EndsBlock,
    }
}

/// Plain loads and stores, and pairs of them; all others (exclusive, atomic, of literals, tagged) are unknown.
fn load_or_store(word: u32, [rt, rn, rt2]: [(u32, u32); 3]) -> Kind {
    let vector = word >> 26 & 1 == 1;
    let of = |registers: u32| if vector { 0 } else { registers };
    let passes = |loads: bool, registers: u32, growth: u64| {
        let registers = of(registers);
        let (written, stored) = if loads { (registers, 0) } else { (0, registers) };
        Kind::Passes { written, stored, growth }
    };
    // ldp, stp: 00 no-allocate, 01 post-index, 10 offset, 11 pre-index
    if word >> 27 & 7 == 0b101 {
        let loads = word >> 22 & 1 == 1;
        let registers = rt.1 | rt2.1;
        if word >> 30 == 0b11 || !vector && !loads && word >> 30 == 0b01 {
            return Kind::Unknown; // unallocated; tagged
        }
        let (updates, before) = (word >> 23 & 1 == 1, word >> 24 & 1 == 1);
        if !updates {
            return passes(loads, registers, 0);
        }
        if rn.0 != STACK_POINTER {
            return Kind::Unknown;
        }
        let scale = match (vector, word >> 30) {
            (true, opc) => 2 + opc,
            (false, 0b10) => 3,
            (false, _) => 2,
        };
        let distance = (i64::from(word << 10 >> 25) ^ 0x40) - 0x40;
        return match u64::try_from(-(distance << scale)) {
            Ok(growth) if before && !loads => passes(false, registers, growth),
            _ => Kind::MovesStack,
        };
    }
    // ldr, str with an unscaled (xx00) or scaled immediate; opc 00 stores, 10 of size 11 prefetches.
    let scaled = word >> 24 & 0x3b == 0b11_1001;
    let single = word >> 24 & 0x3b == 0b11_1000 && word >> 21 & 1 == 0;
    if !scaled && !single {
        return Kind::Unknown;
    }
    let stores = if vector { word >> 22 & 1 == 0 } else { word >> 22 & 3 == 0 };
    match if scaled { 0 } else { word >> 10 & 3 } {
        0 => passes(!stores, rt.1, 0),
        // Pre-index: the usual way to make room for one or two registers.
        3 if rn.0 == STACK_POINTER && stores => {
            let distance = (i64::from(word << 11 >> 23) ^ 0x100) - 0x100;
            match u64::try_from(-distance) {
                Ok(growth) => passes(false, rt.1, growth),
                Err(_) => Kind::MovesStack,
            }
        }
        1 | 3 if rn.0 == STACK_POINTER => Kind::MovesStack,
        _ => Kind::Unknown,
    }
}

/// What keeps a probe at `offset` from being hit exactly once by every call.
fn obstacle(code: &[u8], offset: u64) -> Option<Reason> {
    if offset == 0 {
        return None;
    }
    if code.len() >= MAX_WHOLE_FUNCTION {
        return Some(Reason::Unprovable);
    }
    let words = code.as_chunks::<4>().0.iter().map(|bytes| u32::from_le_bytes(*bytes));
    let mut found = None;
    for (n, word) in words.enumerate() {
        if let Some(distance) = distance(word) {
            let target = (n as i64 * 4).checked_add(distance).and_then(|t| u64::try_from(t).ok());
            if target.is_some_and(|t| (1..=offset).contains(&t)) {
                return Some(Reason::LoopsBack);
            }
        }
        // A jump through a table, unless it is a tail call of a function pointer: that is not told apart here.
        if word & 0xffff_fc1f == 0xd61f_0000 {
            found = Some(Reason::Unprovable);
        }
    }
    found
}

/// How far a direct branch or call leads, bytes; `None` for all else.
fn distance(word: u32) -> Option<i64> {
    let field = |low: u32, bits: u32| {
        let value = i64::from(word >> low & ((1 << bits) - 1));
        let sign = 1 << (bits - 1);
        ((value ^ sign) - sign) * 4
    };
    match () {
        () if word & 0x7c00_0000 == 0x1400_0000 => Some(field(0, 26)), // b, bl
        () if word & 0xff00_0010 == 0x5400_0000 => Some(field(5, 19)), // b.cond
        () if word & 0x7e00_0000 == 0x3400_0000 => Some(field(5, 19)), // cbz, cbnz
        () if word & 0x7e00_0000 == 0x3600_0000 => Some(field(5, 14)), // tbz, tbnz
        () => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FREE: Needs = Needs { arguments: 1, returns: false };
    const MALLOC: Needs = Needs { arguments: 1, returns: true };

    const BTI_C: u32 = 0xd503_245f;
    const PACIASP: u32 = 0xd503_233f;
    const NOP: u32 = 0xd503_201f;
    const RET: u32 = 0xd65f_03c0;
    const CBZ_X0_PLUS_8: u32 = 0xb400_0040;
    const ADRP_X1: u32 = 0xb000_0001;
    const STP_X29_X30_PRE_48: u32 = 0xa9bd_7bfd; // stp x29, x30, [sp, #-48]!
    const STP_X19_X20_PRE_32: u32 = 0xa9be_53f3; // stp x19, x20, [sp, #-32]!
    const STR_X19_PRE_16: u32 = 0xf81f_0ff3; // str x19, [sp, #-16]!
    const SUB_SP_64: u32 = 0xd101_03ff; // sub sp, sp, #0x40
    const MOV_X0_X1: u32 = 0xaa01_03e0;
    const MOV_W0_1: u32 = 0x5280_0020; // mov w0, #1
    const CMP_X0_0: u32 = 0xf100_001f;
    const BL: u32 = 0x9400_0010;

    fn code(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|w| w.to_le_bytes()).collect()
    }

    fn place_words(words: &[u32], needs: Needs) -> Placement {
        place(&code(words), needs)
    }

    /// glibc's free starts with a comparison of its argument to zero, which the kernel simulates.
    #[test]
    fn a_branch_at_the_entry_is_taken() {
        assert_eq!(place_words(&[CBZ_X0_PLUS_8, RET, RET], FREE), Placement::emulated(0, 0));
    }

    /// Hints are single-stepped, and nop is too before 6.13; neither changes anything that the probe needs.
    #[test]
    fn hints_and_comparisons_are_passed_over() {
        assert_eq!(place_words(&[BTI_C, NOP, CMP_X0_0, CBZ_X0_PLUS_8, RET, RET], MALLOC), Placement::emulated(12, 0));
    }

    /// After `paciasp` the return address is signed: a return probe's own address would fail the check and kill the
    /// target, and an entry probe would read a wrong caller.
    #[test]
    fn a_signed_return_address_ends_the_search() {
        for needs in [FREE, MALLOC] {
            assert_eq!(place_words(&[PACIASP, ADRP_X1, RET], needs), Placement::entry(Reason::StackMoved));
        }
    }

    /// Once the return address is stored, what a return probe puts into the register is overwritten from the stack.
    #[test]
    fn a_stored_return_address_ends_the_search_for_returns_only() {
        let words = [STP_X29_X30_PRE_48, ADRP_X1, RET];
        assert_eq!(place_words(&words, MALLOC), Placement::entry(Reason::StackMoved));
        assert_eq!(place_words(&words, FREE), Placement::emulated(4, 48));
    }

    /// The stack pointer's distance counts every way of making room.
    #[test]
    fn room_on_the_stack_is_added_up() {
        let words = [STP_X19_X20_PRE_32, STR_X19_PRE_16, SUB_SP_64, ADRP_X1, RET];
        assert_eq!(place_words(&words, FREE), Placement::emulated(12, 32 + 16 + 64));
        assert_eq!(place_words(&words, MALLOC), Placement::entry(Reason::StackMoved));
    }

    /// Both widths of a register are the same register.
    #[test]
    fn a_destroyed_argument_ends_the_search() {
        for first in [MOV_X0_X1, MOV_W0_1] {
            let words = [first, ADRP_X1, RET];
            assert_eq!(place_words(&words, FREE), Placement::entry(Reason::Clobbered));
            assert_eq!(place_words(&words, Needs { arguments: 2, returns: true }), Placement::emulated(4, 0));
        }
    }

    /// Instructions that move the stack pointer otherwise: up, by a register, by an alignment.
    #[test]
    fn an_unclear_stack_pointer_ends_the_search() {
        // add sp, sp, #16; sub sp, sp, x1; and sp, x1, #-16; ldp x29, x30, [sp], #16; str x0, [sp], #16; mov sp, x0
        for first in [0x9100_43ff, 0xcb21_63ff, 0x927c_ec3f, 0xa8c1_7bfd, 0xf801_07e0, 0x9100_001f] {
            let place = place_words(&[first, ADRP_X1, RET], FREE);
            assert_eq!(place, Placement::entry(Reason::StackMoved), "{first:#x}");
        }
    }

    /// A probe between an exclusive load and its store makes the store fail for ever; such code is not passed.
    #[test]
    fn exclusive_atomic_and_unheard_of_instructions_end_the_search() {
        // ldaxr w1, [x0]; ldadd x1, x2, [x0]; ldr x1, literal; svc is a block's end; sve add
        for first in [0x885f_fc01, 0xf821_0002, 0x5800_0041, 0x0420_0000, 0x0000_0000] {
            assert_eq!(place_words(&[first, ADRP_X1, RET], FREE), Placement::entry(Reason::Unknown), "{first:#x}");
        }
    }

    /// Calls, returns, system calls and computed jumps end the block.
    #[test]
    fn a_block_that_ends_first_leaves_the_entry() {
        for first in [BL, RET, 0xd400_0001, 0xd61f_0020, 0xd63f_0020] {
            assert_eq!(place_words(&[first, ADRP_X1], FREE), Placement::entry(Reason::BlockEnded), "{first:#x}");
        }
    }

    /// A loop back to the probed instruction would count one call many times; a jump table could do the same.
    #[test]
    fn a_loop_ends_the_search() {
        let back_to_4 = 0x17ff_ffff; // b .-4
        assert_eq!(place_words(&[NOP, CBZ_X0_PLUS_8, back_to_4, RET], FREE), Placement::entry(Reason::LoopsBack));
        let conditionally = [0x54ff_ffe1, 0xb5ff_ffe0, 0x3707_ffe0]; // b.ne, cbnz x0, tbnz w0, #0 : .-4
        for branch in conditionally {
            assert_eq!(
                place_words(&[NOP, ADRP_X1, branch, RET], FREE),
                Placement::entry(Reason::LoopsBack),
                "{branch:#x}"
            );
        }
        let table = [NOP, ADRP_X1, 0xd61f_0020];
        assert_eq!(place_words(&table, FREE), Placement::entry(Reason::Unprovable));
    }

    /// Code that ends in the middle of an instruction, or with the function.
    #[test]
    fn cut_code_leaves_the_entry() {
        let whole = code(&[NOP, ADRP_X1]);
        assert_eq!(place(&whole[..6], FREE), Placement::entry(Reason::Undecodable));
        assert_eq!(place(&whole[..4], FREE), Placement::entry(Reason::BlockEnded));
        assert_eq!(place(&whole, FREE), Placement::emulated(4, 0));
    }
}
