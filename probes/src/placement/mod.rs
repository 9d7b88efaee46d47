//! Where in a function the probe goes.
//!
//! A uprobe is a breakpoint. The kernel emulates the instruction underneath only if it is one of a few kinds; any other
//! is single-stepped, which costs a second trap: some 1 us more on bare metal and 20 us in a virtual machine. So the
//! probe goes to the first emulated instruction of the first basic block that every call passes exactly once, where the
//! arguments are still in their registers, or copied to others, and the return address is where it was at the entry. Instruction boundaries
//! come from a decoder: a breakpoint inside an instruction would corrupt the target. Where there is no such place the
//! probe goes to the entry, and the [`Reason`] says why.
//!
//! Decides from bytes alone and touches nothing; what the bytes are is the caller's business, and garbage is answered
//! with the entry. The rules of both architectures are compiled everywhere, so that both are tested everywhere.

mod arm64;
mod x86;

use std::fmt;

/// Functions with as much code as this may go on beyond what was read of them: a jump back to the probe could be there.
const MAX_WHOLE_FUNCTION: usize = 64 * 1024;

/// What a probe needs to find intact.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// Bit n: argument n (0 to 5) is read.
    pub arguments: u8,
    /// The function's return is probed too.
    pub returns: bool,
}

/// A place for a probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Placement {
    /// Bytes from the function's first byte.
    pub offset: u64,
    /// Stack pointer at the function's entry minus stack pointer at the probe, bytes.
    pub sp_offset: u64,
    /// By argument: the register that holds it at the probe, as the processor numbers them, when that is no longer the
    /// one of the calling convention.
    pub copies: [Option<u8>; 6],
    /// False: the kernel must single-step the instruction.
    pub emulated: bool,
    /// Why there is no better place; `None` when the instruction is emulated.
    pub reason: Option<Reason>,
}

impl Placement {
    /// The function's first byte, because the caller wants that one.
    pub const ENTRY: Placement = Placement::entry(Reason::Asked);

    /// The function's first byte, for want of a better one.
    const fn entry(reason: Reason) -> Placement {
        Placement { offset: 0, sp_offset: 0, copies: [None; 6], emulated: false, reason: Some(reason) }
    }

    /// An instruction that the kernel emulates.
    const fn emulated(offset: u64, sp_offset: u64) -> Placement {
        Placement { offset, sp_offset, copies: [None; 6], emulated: true, reason: None }
    }

    /// The register that holds an argument (0 to 5) at the probe, as the processor numbers them.
    pub fn register(&self, argument: u8) -> u8 {
        let own = Architecture::NATIVE.argument_registers()[usize::from(argument) % 6];
        self.copies[usize::from(argument) % 6].unwrap_or(own)
    }
}

/// Why a probe is not on an instruction that the kernel emulates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reason {
    /// The entry was asked for; nobody looked for a better place.
    Asked,
    /// The code is not known: the symbol has no size.
    NoCode,
    /// The bytes are no instruction, or the function ends in the middle of one.
    Undecodable,
    /// An argument, or the caller's frame pointer, is overwritten first.
    Clobbered,
    /// The return address is no longer where it was at the entry, and the return is to be probed.
    StackMoved,
    /// The function calls, returns or jumps to a computed address first.
    BlockEnded,
    /// A jump leads behind the entry and not behind the place: one call could hit the probe several times.
    LoopsBack,
    /// The function has a computed jump or more code than is read of it: that no jump leads back cannot be seen.
    Unprovable,
    /// An instruction comes first whose effect is not known here.
    Unknown,
    /// There is no rule for this processor architecture.
    Architecture,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Reason::Asked => "the entry was asked for",
            Reason::NoCode => "the symbol has no size",
            Reason::Undecodable => "its code cannot be decoded",
            Reason::Clobbered => "it overwrites an argument or the frame pointer first",
            Reason::StackMoved => "it moves the return address first",
            Reason::BlockEnded => "it calls or returns first",
            Reason::LoopsBack => "a loop leads back to the place",
            Reason::Unprovable => "a loop could lead back to the place",
            Reason::Unknown => "an instruction without a known effect comes first",
            Reason::Architecture => "there is no rule for this processor",
        })
    }
}

/// Processor architectures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Architecture {
    /// x86-64.
    X86_64,
    /// 64-bit ARM.
    Arm64,
    /// Another one; probes go to the entry.
    Other,
}

impl Architecture {
    /// The one that this was built for.
    pub const NATIVE: Architecture = if cfg!(target_arch = "x86_64") {
        Architecture::X86_64
    } else if cfg!(target_arch = "aarch64") {
        Architecture::Arm64
    } else {
        Architecture::Other
    };

    /// The registers that arguments are passed in, as the processor numbers them.
    pub const fn argument_registers(self) -> [u8; 6] {
        match self {
            Architecture::X86_64 => [7, 6, 2, 1, 8, 9],
            Architecture::Arm64 | Architecture::Other => [0, 1, 2, 3, 4, 5],
        }
    }
}

/// The best place in a function with this machine code of this machine's architecture.
pub fn place(code: &[u8], needs: Needs) -> Placement {
    place_on(Architecture::NATIVE, code, needs)
}

/// The first byte of a function with this machine code of this machine's architecture, because the caller wants it.
pub fn entry(code: &[u8]) -> Placement {
    let best = place(code, Needs::default());
    Placement { emulated: best.emulated && best.offset == 0, ..Placement::ENTRY }
}

/// The best place in a function with this machine code of this architecture.
pub fn place_on(architecture: Architecture, code: &[u8], needs: Needs) -> Placement {
    if code.is_empty() {
        return Placement::entry(Reason::NoCode);
    }
    match architecture {
        Architecture::X86_64 => x86::place(code, needs),
        Architecture::Arm64 => arm64::place(code, needs),
        Architecture::Other => Placement::entry(Reason::Architecture),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A symbol without a size brings no code.
    #[test]
    fn no_code_leaves_the_entry() {
        for architecture in [Architecture::X86_64, Architecture::Arm64, Architecture::Other] {
            assert_eq!(place_on(architecture, &[], Needs::default()), Placement::entry(Reason::NoCode));
        }
    }

    /// Elsewhere nothing is known of the instructions.
    #[test]
    fn another_architecture_keeps_the_entry() {
        let place = place_on(Architecture::Other, &[0x53], Needs::default());
        assert_eq!(place, Placement::entry(Reason::Architecture));
        assert_eq!(place.reason.map(|r| r.to_string()).as_deref(), Some("there is no rule for this processor"));
    }

    /// `place` is the rule of the machine that this was built for.
    #[test]
    #[cfg(target_arch = "x86_64")]
    fn the_native_rule_is_used() {
        assert_eq!(place(&[0xf3, 0x0f, 0x1e, 0xfa, 0x53], Needs::default()), Placement::emulated(4, 0));
        // `endbr64` is single-stepped, `push %rbx` is emulated: where the entry is asked for, its price depends on it.
        assert_eq!(entry(&[0xf3, 0x0f, 0x1e, 0xfa, 0x53]), Placement::ENTRY);
        assert_eq!(entry(&[0x53]), Placement { emulated: true, ..Placement::ENTRY });
    }
}
