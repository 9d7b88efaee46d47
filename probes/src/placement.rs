//! Where in a function the probe goes.
//!
//! A uprobe is a breakpoint. The kernel emulates the instruction underneath only if it is one of a few kinds (push of
//! a register, one-byte nop, relative jumps); any other is single-stepped, which costs a second trap: some 1 us more
//! on bare metal and 20 us in a virtual machine. So the probe goes to the first emulated instruction of the first
//! basic block that every call passes exactly once, where the arguments are still in their registers, and, for a
//! return probe, where the stack pointer still points at the return address. Instruction boundaries come from a
//! decoder: a breakpoint inside an instruction would corrupt the target.
//!
//! Source: arch/x86/kernel/uprobes.c, `branch_setup_xol_ops` and `push_setup_xol_ops` (Linux 4.20 and later).

/// What a probe needs to find intact.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// Bit n: argument n (0 to 5) is read.
    pub arguments: u8,
    /// The function's return is probed too.
    pub returns: bool,
}

/// A place for a probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placement {
    /// Bytes from the function's first byte.
    pub offset: u64,
    /// Stack pointer at the function's entry minus stack pointer at the probe, bytes.
    pub sp_offset: u64,
    /// False: the kernel must single-step the instruction.
    pub emulated: bool,
}

impl Placement {
    /// The function's first byte.
    pub const ENTRY: Placement = Placement { offset: 0, sp_offset: 0, emulated: false };
}

/// The best place in a function with this machine code; its entry when there is no better one.
#[cfg(target_arch = "x86_64")]
pub fn place(code: &[u8], needs: Needs) -> Placement {
    x86::place(code, needs)
}

/// The best place in a function with this machine code: its entry. arm64 kernels simulate branches and literal loads
/// only, which functions do not start with, and single-stepping is cheap there.
#[cfg(not(target_arch = "x86_64"))]
pub fn place(_code: &[u8], _needs: Needs) -> Placement {
    Placement::ENTRY
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use iced_x86::{
        Code, Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory, OpAccess, Register,
    };

    use super::{Needs, Placement};

    /// Argument registers of the System V calling convention, in order.
    const ARGUMENTS: [Register; 6] =
        [Register::RDI, Register::RSI, Register::RDX, Register::RCX, Register::R8, Register::R9];

    pub(super) fn place(code: &[u8], needs: Needs) -> Placement {
        let mut decoder = Decoder::with_ip(64, code, 0, DecoderOptions::NONE);
        let mut info = InstructionInfoFactory::new();
        let mut sp_offset = 0_u64;
        while decoder.can_decode() {
            let instruction = decoder.decode();
            if instruction.is_invalid() || (needs.returns && sp_offset != 0) {
                break;
            }
            if is_emulated(&instruction) {
                let placement = Placement { offset: instruction.ip(), sp_offset, emulated: true };
                return if is_entered_from_behind(code, placement.offset) { Placement::ENTRY } else { placement };
            }
            if instruction.flow_control() != FlowControl::Next {
                break;
            }
            let written = info.info(&instruction).used_registers().iter().any(|used| {
                let writes = !matches!(used.access(), OpAccess::Read | OpAccess::CondRead | OpAccess::None);
                let register = used.register().full_register();
                writes && (0..6).any(|n| needs.arguments & (1 << n) != 0 && register == ARGUMENTS[n])
            });
            if written {
                break;
            }
            match stack_growth(&instruction) {
                Some(bytes) => sp_offset += bytes,
                None => break,
            }
        }
        Placement::ENTRY
    }

    /// True when the kernel emulates it.
    fn is_emulated(instruction: &Instruction) -> bool {
        match instruction.code() {
            Code::Push_r64 => instruction.len() <= 2,
            Code::Nopd | Code::Nopw | Code::Nopq => instruction.len() == 1,
            _ => instruction.is_jcc_short_or_near() || instruction.is_jmp_short_or_near(),
        }
    }

    /// How far it moves the stack pointer down; `None` when that is not known.
    fn stack_growth(instruction: &Instruction) -> Option<u64> {
        match instruction.code() {
            Code::Sub_rm64_imm8 | Code::Sub_rm64_imm32 if instruction.op0_register() == Register::RSP => {
                Some(instruction.immediate(1))
            }
            _ => {
                let moved = instruction.stack_pointer_increment();
                let mut info = InstructionInfoFactory::new();
                let writes_sp = info.info(instruction).used_registers().iter().any(|used| {
                    used.register().full_register() == Register::RSP
                        && !matches!(used.access(), OpAccess::Read | OpAccess::CondRead | OpAccess::None)
                });
                match (writes_sp, moved) {
                    (false, _) => Some(0),
                    (true, n) if n < 0 => Some(u64::from(n.unsigned_abs())),
                    _ => None,
                }
            }
        }
    }

    /// True when a jump of the function leads behind its first byte and not behind `offset`: one call could hit the
    /// probe several times.
    fn is_entered_from_behind(code: &[u8], offset: u64) -> bool {
        if offset == 0 {
            return false;
        }
        Decoder::with_ip(64, code, 0, DecoderOptions::NONE)
            .iter()
            .filter(|i| i.is_jcc_short_or_near() || i.is_jmp_short_or_near() || i.is_loop() || i.is_loopcc())
            .any(|i| (1..=offset).contains(&i.near_branch_target()))
    }
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;

    const FREE: Needs = Needs { arguments: 1, returns: false };
    const MALLOC: Needs = Needs { arguments: 1, returns: true };

    /// glibc's free: `test %rdi,%rdi; je` is single-stepped at its entry and emulated three bytes later.
    #[test]
    fn a_test_before_a_jump_is_passed_over() {
        let code = [0x48, 0x85, 0xff, 0x0f, 0x84, 0x10, 0, 0, 0];
        assert_eq!(place(&code, FREE), Placement { offset: 3, sp_offset: 0, emulated: true });
    }

    /// Functions of binaries with control-flow protection start with `endbr64`.
    #[test]
    fn endbr64_is_passed_over() {
        let code = [0xf3, 0x0f, 0x1e, 0xfa, 0x41, 0x54, 0xc3];
        assert_eq!(place(&code, MALLOC), Placement { offset: 4, sp_offset: 0, emulated: true });
    }

    /// After `sub $8,%rsp` the return address is not on top of the stack: a return probe would overwrite another word.
    #[test]
    fn a_return_probe_stays_where_the_stack_pointer_is_untouched() {
        let code = [0x48, 0x83, 0xec, 0x08, 0x74, 0x02, 0xc3];
        assert_eq!(place(&code, MALLOC), Placement::ENTRY);
        assert_eq!(place(&code, FREE), Placement { offset: 4, sp_offset: 8, emulated: true });
    }

    /// `mov %rsi,%rdi` before the jump destroys argument 0.
    #[test]
    fn a_destroyed_argument_ends_the_search() {
        let code = [0x48, 0x89, 0xf7, 0x74, 0x02, 0xc3];
        assert_eq!(place(&code, FREE), Placement::ENTRY);
        assert_eq!(place(&code, Needs { arguments: 2, returns: false }).offset, 3);
    }

    /// A loop back to the probed instruction would count one call many times.
    #[test]
    fn an_instruction_that_a_loop_returns_to_is_not_taken() {
        // test %rdi,%rdi; je +4; dec %rdi (3 bytes); jmp to the je
        let code = [0x48, 0x85, 0xff, 0x74, 0x05, 0x48, 0xff, 0xcf, 0xeb, 0xf9, 0xc3];
        assert_eq!(place(&code, FREE), Placement::ENTRY);
    }

    /// No code, garbage and a lone return leave the entry.
    #[test]
    fn nothing_better_leaves_the_entry() {
        for code in [&[][..], &[0x06, 0x06], &[0xc3]] {
            assert_eq!(place(code, MALLOC), Placement::ENTRY);
        }
    }
}
