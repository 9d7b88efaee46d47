//! The rule for x86-64.
//!
//! What kernels do with the instruction under a breakpoint (arch/x86/kernel/uprobes.c, `branch_setup_xol_ops`,
//! `push_setup_xol_ops` and `uprobe_init_insn`):
//!
//! | instruction | 5.10 to 7.2 |
//! |---|---|
//! | `push` of a register, without prefix or with REX.B alone | emulated (commit e7ed9d9bd0375) |
//! | `jmp` and all conditional jumps, 8 and 32 bits | emulated; refused with an operand-size prefix |
//! | `nop`, one byte | emulated; with an operand-size prefix refused before 6.2 (commit cefa72129e453) |
//! | `nop` of several bytes | single-stepped before 6.18, then emulated and replaced (commit ba2bfc97b4629) |
//! | `call` with a 32-bit distance | emulated |
//! | segment prefixes other than `fs` and `gs`, `lock`; privileged and invalid opcodes | refused: attaching fails |
//! | all others | single-stepped |
//!
//! Only what all of them emulate is used, in its plain encoding: not one prefix more than listed. Not used either:
//! - `nop` of several bytes: the call that replaces one of 5 bytes overwrites the target's red zone, which is free at a
//!   function's entry only. `jmp +8` may be taken for what a later form of the replacement leaves behind.
//! - `call`: the return address goes to the stack but not to the shadow stack, where the target has one.

use iced_x86::{
    Code, Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind,
    Register,
};

use super::{Architecture, MAX_WHOLE_FUNCTION, Needs, Placement, Reason};

/// Second bytes of two-byte opcodes that some kernel refuses, or that no function has reason to start with.
const REFUSED_0F: [u8; 18] =
    [0x00, 0x01, 0x05, 0x06, 0x07, 0x08, 0x09, 0x0b, 0x0c, 0x30, 0x34, 0x35, 0x37, 0x78, 0x79, 0xae, 0xb2, 0xff];

pub(super) fn place(code: &[u8], needs: Needs) -> Placement {
    let mut decoder = Decoder::with_ip(64, code, 0, DecoderOptions::NONE);
    let mut info = InstructionInfoFactory::new();
    let mut sp_offset = 0;
    let mut arguments = Arguments::at_entry();
    // Where the probe goes when the kernel refuses one at the entry and nothing is emulated.
    let mut stepped = None;
    let reason = loop {
        if needs.returns && sp_offset != 0 {
            break Reason::StackMoved;
        }
        if !decoder.can_decode() {
            break Reason::BlockEnded;
        }
        let instruction = decoder.decode();
        if instruction.is_invalid() {
            break Reason::Undecodable;
        }
        let at = instruction.ip();
        let bytes = &code[at as usize..instruction.next_ip() as usize];
        if is_emulated(bytes) {
            match obstacle(code, at) {
                None => return Placement { copies: arguments.copies(), ..Placement::emulated(at, sp_offset) },
                Some(reason) => break reason,
            }
        }
        if stepped.is_none() && is_steppable(&instruction, bytes) {
            stepped = Some((at, sp_offset, arguments.copies()));
        }
        if ends_block(&instruction) {
            break Reason::BlockEnded;
        }
        arguments.follow(&instruction, &mut info);
        // The stack of the caller is unwound from its rbp.
        let frame = info.info(&instruction).used_registers().iter();
        let mut frame = frame.filter(|used| used.register().full_register() == Register::RBP);
        if !arguments.has(needs.arguments) || frame.any(|used| writes(used.access())) {
            break Reason::Clobbered;
        }
        match stack_growth(&instruction, &mut info) {
            Some(bytes) => sp_offset += bytes,
            None => break Reason::StackMoved,
        }
    };
    match stepped {
        Some((offset, sp_offset, copies)) if obstacle(code, offset).is_none() => {
            Placement { offset, sp_offset, copies, emulated: false, reason: Some(reason) }
        }
        _ => Placement::entry(reason),
    }
}

/// Which registers hold arguments: compilers copy them out of the registers that they came in early on.
struct Arguments {
    /// By number of a general-purpose register: the argument whose whole value it holds.
    held: [Option<usize>; 16],
}

impl Arguments {
    fn at_entry() -> Self {
        let mut held = [None; 16];
        for (argument, register) in Architecture::X86_64.argument_registers().into_iter().enumerate() {
            held[usize::from(register)] = Some(argument);
        }
        Arguments { held }
    }

    /// Takes in what an instruction does to registers.
    fn follow(&mut self, instruction: &Instruction, info: &mut InstructionInfoFactory) {
        let copied = match instruction.code() {
            Code::Mov_r64_rm64 | Code::Mov_rm64_r64 if instruction.op1_kind() == OpKind::Register => {
                self.held[instruction.op1_register().number() & 15]
            }
            _ => None,
        };
        for used in info.info(instruction).used_registers().iter().filter(|used| writes(used.access())) {
            let register = used.register().full_register();
            if register.is_gpr64() {
                self.held[register.number() & 15] = copied.filter(|_| instruction.op0_kind() == OpKind::Register);
            }
        }
    }

    /// True when every argument of the mask is in some register.
    fn has(&self, mask: u8) -> bool {
        (0..6).all(|n| mask & (1 << n) == 0 || self.held.contains(&Some(n)))
    }

    /// By argument: another register that holds it, when its own one does not.
    fn copies(&self) -> [Option<u8>; 6] {
        let own = Architecture::X86_64.argument_registers();
        std::array::from_fn(|n| {
            let lost = self.held[usize::from(own[n])] != Some(n);
            (0_u8..16).find(|r| lost && self.held[usize::from(*r)] == Some(n))
        })
    }
}

/// True when every supported kernel emulates it.
fn is_emulated(bytes: &[u8]) -> bool {
    match *bytes {
        [0x50..=0x57] | [0x41, 0x50..=0x57] | [0x90] => true,
        [0xeb, distance] => distance != 8,
        [0x70..=0x7f, _] | [0xe9, _, _, _, _] | [0x0f, 0x80..=0x8f, _, _, _, _] => true,
        _ => false,
    }
}

/// True when every supported kernel single-steps it, whatever follows it. Errs on the side of false.
fn is_steppable(instruction: &Instruction, bytes: &[u8]) -> bool {
    let prefixes =
        bytes.iter().take_while(|b| matches!(b, 0x26 | 0x2e | 0x36 | 0x3e | 0x64..=0x67 | 0xf0 | 0xf2 | 0xf3));
    let (legacy, mut rest) = bytes.split_at(prefixes.count());
    if legacy.iter().any(|b| matches!(b, 0x26 | 0x2e | 0x36 | 0x3e | 0xf0)) {
        return false;
    }
    if let [0x40..=0x4f, tail @ ..] = rest {
        rest = tail;
    }
    match rest {
        // `nop` of several bytes is harmless at the entry alone, see the table above.
        [0x0f, 0x1f, ..] => instruction.ip() == 0,
        [0x0f, 0x80..=0x8f, ..] => !legacy.contains(&0x66),
        [0x0f, opcode, ..] => !REFUSED_0F.contains(opcode),
        // Vector prefixes: which opcodes behind them are refused is an accident of the kernel's tables. Moves to a
        // segment register. Interrupts, ports and privileged ones.
        [0x62 | 0x6c..=0x6f | 0x8e | 0x8f | 0x9d | 0xc4 | 0xc5 | 0xcc..=0xcf | 0xe4..=0xe7 | 0xec..=0xef, ..] => false,
        [0xf1 | 0xf4 | 0xfa | 0xfb, ..] => false,
        // These are not used, see there.
        [0xeb, 8] | [0xe8, ..] => false,
        [0x70..=0x7f | 0x90 | 0xe9 | 0xeb, ..] => !legacy.contains(&0x66),
        _ => true,
    }
}

/// True when the next instruction need not follow, or a transaction begins or ends, which a probe would abort.
fn ends_block(instruction: &Instruction) -> bool {
    instruction.flow_control() != FlowControl::Next
        || matches!(instruction.mnemonic(), Mnemonic::Hlt | Mnemonic::Xbegin | Mnemonic::Xabort | Mnemonic::Xend)
}

fn writes(access: OpAccess) -> bool {
    !matches!(access, OpAccess::Read | OpAccess::CondRead | OpAccess::None | OpAccess::NoMemAccess)
}

/// How far it moves the stack pointer down; `None` when that is not known.
fn stack_growth(instruction: &Instruction, info: &mut InstructionInfoFactory) -> Option<u64> {
    match instruction.code() {
        Code::Sub_rm64_imm8 | Code::Sub_rm64_imm32 if instruction.op0_register() == Register::RSP => {
            i32::try_from(instruction.immediate(1).cast_signed()).ok().and_then(|bytes| u64::try_from(bytes).ok())
        }
        Code::Push_r64 | Code::Push_rm64 | Code::Pushq_imm8 | Code::Pushq_imm32 | Code::Pushfq => Some(8),
        _ => {
            let moves = info
                .info(instruction)
                .used_registers()
                .iter()
                .any(|used| used.register().full_register() == Register::RSP && writes(used.access()));
            (!moves).then_some(0)
        }
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
    let mut info = InstructionInfoFactory::new();
    // By register: how many more instructions it may hold an address out of a jump table.
    let mut table = [0_u8; 16];
    let mut found = None;
    for instruction in &mut Decoder::with_ip(64, code, 0, DecoderOptions::NONE) {
        let leaves = matches!(
            instruction.flow_control(),
            FlowControl::ConditionalBranch
                | FlowControl::UnconditionalBranch
                | FlowControl::Call
                | FlowControl::XbeginXabortXend
        );
        if leaves && (1..=offset).contains(&instruction.near_branch_target()) {
            return Some(Reason::LoopsBack);
        }
        if is_table_jump(&instruction, &table) {
            found = Some(Reason::Unprovable);
        }
        follow(&instruction, &mut info, &mut table);
    }
    found
}

/// True for a jump to an address out of a table: it may lead anywhere in the function. Other computed jumps are tail
/// calls of function pointers.
fn is_table_jump(instruction: &Instruction, table: &[u8; 16]) -> bool {
    if instruction.flow_control() != FlowControl::IndirectBranch {
        return false;
    }
    match instruction.op0_kind() {
        OpKind::Register => table[instruction.op0_register().number() & 15] > 0,
        _ => instruction.memory_index() != Register::None,
    }
}

/// Keeps track of registers that hold an address out of a jump table: an indexed load, or, for a table of distances,
/// the sum of one and its base. Compilers put the jump right behind.
fn follow(instruction: &Instruction, info: &mut InstructionInfoFactory, table: &mut [u8; 16]) {
    const INSTRUCTIONS_TO_JUMP: u8 = 8;
    let indexed = matches!(instruction.mnemonic(), Mnemonic::Mov | Mnemonic::Movsxd | Mnemonic::Movzx)
        && instruction.op1_kind() == OpKind::Memory
        && instruction.memory_index() != Register::None;
    let computes = indexed || matches!(instruction.mnemonic(), Mnemonic::Add | Mnemonic::Lea | Mnemonic::Sub);
    for left in table.iter_mut() {
        *left = left.saturating_sub(1);
    }
    for used in info.info(instruction).used_registers().iter().filter(|used| writes(used.access())) {
        let register = used.register().full_register();
        if register.is_gpr64() {
            table[register.number() & 15] = if computes { INSTRUCTIONS_TO_JUMP } else { 0 };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FREE: Needs = Needs { arguments: 1, returns: false };
    const MALLOC: Needs = Needs { arguments: 1, returns: true };

    /// An emulated place where argument 0 is in another register.
    fn moved(offset: u64, register: u8) -> Placement {
        let copies = [Some(register), None, None, None, None, None];
        Placement { copies, ..Placement::emulated(offset, 0) }
    }

    /// glibc's free: `test %rdi,%rdi; je` is single-stepped at its entry and emulated three bytes later.
    #[test]
    fn a_test_before_a_jump_is_passed_over() {
        let code = [0x48, 0x85, 0xff, 0x0f, 0x84, 0x10, 0, 0, 0];
        assert_eq!(place(&code, FREE), Placement::emulated(3, 0));
    }

    /// How allocators of Debian packages start; the first jump's distance is cut where it does not matter.
    #[test]
    fn real_allocators_are_probed_where_it_is_cheap() {
        let glibc_2_31_malloc = [0x48, 0x8b, 0x05, 0x09, 0x81, 0x14, 0x00, 0x41, 0x54];
        let glibc_2_31_free = [
            0x48, 0x83, 0xec, 0x18, 0x48, 0x8b, 0x05, 0xdd, 0x7a, 0x14, 0x00, 0x48, 0x8b, 0x00, 0x48, 0x85, 0xc0, 0x0f,
            0x85, 0x81, 0x00, 0x00, 0x00,
        ];
        let glibc_2_41_malloc = [0x41, 0x54, 0x55, 0x53];
        let jemalloc_5_3_free = [
            0x48, 0x89, 0xf8, 0x48, 0x8b, 0x15, 0x0e, 0x53, 0x0a, 0x00, 0x48, 0x89, 0xf9, 0x48, 0xc1, 0xe8, 0x1a, 0x48,
            0x81, 0xe1, 0x00, 0x00, 0x00, 0xc0, 0x25, 0xf0, 0x00, 0x00, 0x00, 0x64, 0x48, 0x03, 0x04, 0x25, 0x00, 0x00,
            0x00, 0x00, 0x48, 0x01, 0xd0, 0x48, 0x3b, 0x88, 0xb0, 0x01, 0x00, 0x00, 0x0f, 0x85, 0x8a, 0x00, 0x00, 0x00,
        ];
        let tcmalloc_2_10_malloc = [0x48, 0x8b, 0x05, 0x59, 0xab, 0x00, 0x00, 0x48, 0x85, 0xc0, 0x75, 0x75];
        let musl_1_2_5_malloc = [0xf3, 0x0f, 0x1e, 0xfa, 0xe9, 0xc7, 0x00, 0x00, 0x00];
        assert_eq!(place(&glibc_2_31_malloc, MALLOC), Placement::emulated(7, 0));
        assert_eq!(place(&glibc_2_31_free, FREE), Placement::emulated(17, 24));
        assert_eq!(place(&glibc_2_41_malloc, MALLOC), Placement::emulated(0, 0));
        assert_eq!(place(&jemalloc_5_3_free, FREE), Placement::emulated(48, 0));
        assert_eq!(place(&tcmalloc_2_10_malloc, MALLOC), Placement::emulated(10, 0));
        assert_eq!(place(&musl_1_2_5_malloc, MALLOC), Placement::emulated(4, 0));
        // mov %rdi,%rsi; mov %fs:(%rax),%rdi: the size is in another register where the jump comes.
        let mimalloc_2_0_malloc = [
            0x48, 0x8b, 0x05, 0x49, 0xb4, 0x00, 0x00, 0x48, 0x89, 0xfe, 0x64, 0x48, 0x8b, 0x38, 0x48, 0x81, 0xfe, 0x00,
            0x04, 0x00, 0x00, 0x77, 0x29,
        ];
        assert_eq!(place(&mimalloc_2_0_malloc, MALLOC), moved(21, 6));
    }

    /// The caller's frame is found by its rbp: behind `mov %rsp,%rbp` it would be looked for in the wrong place.
    #[test]
    fn a_changed_frame_pointer_ends_the_search() {
        let code = [0x48, 0x89, 0xe5, 0x74, 0x02, 0xc3];
        assert_eq!(place(&code, MALLOC), Placement::entry(Reason::Clobbered));
        let saved_before = [0x48, 0x89, 0xf0, 0x55, 0x48, 0x89, 0xe5, 0x74, 0x02, 0xc3];
        assert_eq!(place(&saved_before, MALLOC), Placement::emulated(3, 0));
    }

    /// Functions of binaries with control-flow protection start with `endbr64`.
    #[test]
    fn endbr64_is_passed_over() {
        let code = [0xf3, 0x0f, 0x1e, 0xfa, 0x41, 0x54, 0xc3];
        assert_eq!(place(&code, MALLOC), Placement::emulated(4, 0));
    }

    /// After `sub $8,%rsp` the return address is not on top of the stack: a return probe would overwrite another word.
    #[test]
    fn a_return_probe_stays_where_the_stack_pointer_is_untouched() {
        let code = [0x48, 0x83, 0xec, 0x08, 0x74, 0x02, 0xc3];
        assert_eq!(place(&code, MALLOC), Placement::entry(Reason::StackMoved));
        assert_eq!(place(&code, FREE), Placement::emulated(4, 8));
    }

    /// Pushes that are single-stepped move the stack pointer too.
    #[test]
    fn the_stack_pointer_is_followed_through_every_push() {
        // push 8(%rdi); push $1; push $256; push %rax with REX.W; pushf; sub $0x100,%rsp; push %rbx
        let code = [0xff, 0x77, 8, 0x6a, 1, 0x68, 0, 1, 0, 0, 0x48, 0x50, 0x9c, 0x48, 0x81, 0xec, 0, 1, 0, 0, 0x53];
        assert_eq!(place(&code, FREE), Placement::emulated(20, 5 * 8 + 256));
    }

    /// Whatever else moves the stack pointer, by however much, ends the search.
    #[test]
    fn an_unclear_stack_pointer_ends_the_search() {
        let movers: [&[u8]; 8] = [
            &[0x48, 0x83, 0xec, 0x80],          // sub $-128,%rsp
            &[0x48, 0x81, 0xec, 0, 0, 0, 0x80], // sub $-2147483648,%rsp
            &[0x48, 0x83, 0xc4, 0xf8],          // add $-8,%rsp
            &[0x48, 0x83, 0xe4, 0xf0],          // and $-16,%rsp
            &[0x48, 0x89, 0xfc],                // mov %rdi,%rsp
            &[0x48, 0x29, 0xc4],                // sub %rax,%rsp
            &[0x58],                            // pop %rax
            &[0x66, 0x50],                      // push %ax
        ];
        for mover in movers {
            let code = [mover, &[0x53, 0xc3]].concat();
            assert_eq!(place(&code, FREE), Placement::entry(Reason::StackMoved), "{mover:x?}");
        }
        // enter $16,$0 writes rbp, too, which the caller's stack is unwound from.
        assert_eq!(place(&[0xc8, 0x10, 0, 0, 0x53, 0xc3], FREE), Placement::entry(Reason::Clobbered));
    }

    /// `mov %rsi,%rdi` before the jump destroys argument 0, and so does a write to a part of it.
    #[test]
    fn a_destroyed_argument_ends_the_search() {
        let writers: [&[u8]; 5] = [
            &[0x48, 0x89, 0xf7],       // mov %rsi,%rdi
            &[0x31, 0xff],             // xor %edi,%edi
            &[0x66, 0xff, 0xc7],       // inc %di
            &[0x40, 0xb7, 1],          // mov $1,%dil
            &[0x48, 0x0f, 0x44, 0xf8], // cmove %rax,%rdi
        ];
        for writer in writers {
            let code = [writer, &[0x74, 0x02, 0xc3]].concat();
            assert_eq!(place(&code, FREE), Placement::entry(Reason::Clobbered), "{writer:x?}");
            let other = Needs { arguments: 2, returns: false };
            assert_eq!(place(&code, other), Placement::emulated(writer.len() as u64, 0), "{writer:x?}");
        }
    }

    /// An argument that was copied before its own register is written is read from the copy.
    #[test]
    fn a_copied_argument_is_found_in_its_copy() {
        const OVERWRITE: &[u8] = &[0x31, 0xff, 0x74, 0x02, 0xc3]; // xor %edi,%edi; je; ret
        let copies: [(&[u8], u8); 4] = [
            (&[0x48, 0x89, 0xf8], 0),                   // mov %rdi,%rax
            (&[0x49, 0x8b, 0xff], 7),                   // mov %r15,%rdi: no copy, see below
            (&[0x49, 0x89, 0xff], 15),                  // mov %rdi,%r15
            (&[0x48, 0x89, 0xf8, 0x49, 0x89, 0xc0], 0), // mov %rdi,%rax; mov %rax,%r8
        ];
        for (copy, register) in copies {
            let code = [copy, OVERWRITE].concat();
            let place = place(&code, FREE);
            match register {
                7 => assert_eq!(place, Placement::entry(Reason::Clobbered), "{copy:x?}"),
                _ => assert_eq!(place, moved(copy.len() as u64 + 2, register), "{copy:x?}"),
            }
        }
        // As long as the argument is in its own register, that is where it is read.
        assert_eq!(place(&[0x48, 0x89, 0xf8, 0x74, 0x02, 0xc3], FREE), Placement::emulated(3, 0));
    }

    /// A part of an argument, a copy that is overwritten, and a copy in memory are no copies.
    #[test]
    fn what_is_no_copy_does_not_count() {
        let others: [&[u8]; 7] = [
            &[0x89, 0xf8],                         // mov %edi,%eax
            &[0x48, 0x63, 0xc7],                   // movslq %edi,%rax
            &[0x48, 0x89, 0xf8, 0x31, 0xc0],       // mov %rdi,%rax; xor %eax,%eax
            &[0x48, 0x89, 0xf8, 0x48, 0xff, 0xc0], // mov %rdi,%rax; inc %rax
            &[0x48, 0x89, 0x3e],                   // mov %rdi,(%rsi)
            &[0x48, 0x8b, 0x07],                   // mov (%rdi),%rax
            &[0x48, 0x0f, 0x44, 0xc7],             // cmove %rdi,%rax
        ];
        for other in others {
            let code = [other, &[0x31, 0xff, 0x74, 0x02, 0xc3]].concat();
            assert_eq!(place(&code, FREE), Placement::entry(Reason::Clobbered), "{other:x?}");
        }
        // Exchanged, the argument is in neither for all that is known here.
        let code = [0x48, 0x87, 0xc7, 0x74, 0x02, 0xc3]; // xchg %rax,%rdi
        assert_eq!(place(&code, FREE), Placement::entry(Reason::Clobbered));
    }

    /// Some instructions write registers that they do not name.
    #[test]
    fn hidden_writes_to_arguments_are_seen() {
        // (instruction, argument): mul %rsi writes rdx; cqto rdx; stosb rdi; rep movsb rcx; cpuid rcx
        let cases: [(&[u8], u8); 5] =
            [(&[0x48, 0xf7, 0xe6], 2), (&[0x48, 0x99], 2), (&[0xaa], 0), (&[0xf3, 0xa4], 3), (&[0x0f, 0xa2], 3)];
        for (instruction, argument) in cases {
            let code = [instruction, &[0x53, 0xc3]].concat();
            let needs = Needs { arguments: 1 << argument, returns: false };
            assert_eq!(place(&code, needs), Placement::entry(Reason::Clobbered), "{instruction:x?}");
            assert!(place(&code, Needs::default()).emulated, "{instruction:x?}");
        }
    }

    /// Of each kind that is emulated there are encodings which some kernel single-steps or refuses, or mistakes.
    #[test]
    fn only_plain_encodings_count_as_emulated() {
        let plain: [&[u8]; 8] = [
            &[0x50],
            &[0x41, 0x57],
            &[0x90],
            &[0xeb, 9],
            &[0xe9, 0, 1, 0, 0],
            &[0x70, 9],
            &[0x7f, 9],
            &[0x0f, 0x8f, 0, 1, 0, 0],
        ];
        let odd: [&[u8]; 10] = [
            &[0x48, 0x50],             // push %rax with REX.W
            &[0xf3, 0x90],             // pause
            &[0x41, 0x90],             // xchg %rax,%r8
            &[0x66, 0x90],             // refused before 6.2
            &[0x3e, 0x75, 9],          // a branch hint: refused
            &[0x66, 0xe9, 0, 1, 0, 0], // refused
            &[0xf2, 0xe9, 0, 1, 0, 0], // bnd jmp
            &[0xeb, 8],                // may be taken for an optimised probe
            &[0x0f, 0x1f, 0x44, 0, 0], // nop of 5 bytes
            &[0xe8, 0, 1, 0, 0],       // call
        ];
        for bytes in plain {
            assert_eq!(place(&[bytes, &[0xc3; 16]].concat(), MALLOC), Placement::emulated(0, 0), "{bytes:x?}");
        }
        for bytes in odd {
            let place = place(&[bytes, &[0xc3; 16]].concat(), MALLOC);
            assert!(!place.emulated && place.reason.is_some(), "{bytes:x?}: {place:?}");
        }
    }

    /// The kernel refuses a probe on `lock incl (%rdi)`, and with it those of the whole library.
    #[test]
    fn an_entry_that_the_kernel_refuses_is_left_for_one_that_it_steps() {
        let refused: [&[u8]; 6] = [
            &[0xf0, 0xff, 0x07],             // lock incl (%rdi)
            &[0xf0, 0x48, 0x0f, 0xc1, 0x07], // lock xadd %rax,(%rdi)
            &[0x3e, 0x8b, 0x07],             // mov %ds:(%rdi),%eax
            &[0x0f, 0xae, 0xf0],             // mfence
            &[0xc5, 0xf8, 0x77],             // vzeroupper
            &[0x66, 0x90],
        ];
        for bytes in refused {
            let code = [bytes, &[0x89, 0xf8, 0xc3]].concat();
            let expected = Placement {
                offset: bytes.len() as u64,
                sp_offset: 0,
                copies: [None; 6],
                emulated: false,
                reason: Some(Reason::BlockEnded),
            };
            assert_eq!(place(&code, FREE), expected, "{bytes:x?}");
        }
        // No other instruction, or none that is hit once: the kernel will say what it thinks of the entry.
        assert_eq!(place(&[0x0f, 0x0b], FREE), Placement::entry(Reason::BlockEnded));
        let looped = [0xf0, 0xff, 0x07, 0x48, 0x89, 0xf8, 0x48, 0x39, 0x07, 0xe2, 0xf8, 0xc3];
        assert_eq!(place(&looped, FREE), Placement::entry(Reason::BlockEnded));
    }

    /// A loop back to the probed instruction would count one call many times.
    #[test]
    fn an_instruction_that_a_loop_returns_to_is_not_taken() {
        // test %rdi,%rdi; je +5; dec %rdi (3 bytes); jmp to the je
        let code = [0x48, 0x85, 0xff, 0x74, 0x05, 0x48, 0xff, 0xcf, 0xeb, 0xf9, 0xc3];
        assert_eq!(place(&code, FREE), Placement::entry(Reason::LoopsBack));
        // The same with `loop` and `jrcxz`.
        for opcode in [0xe2, 0xe3] {
            let code = [0x48, 0x85, 0xff, 0x74, 0x05, 0x48, 0xff, 0xcf, opcode, 0xf9, 0xc3];
            assert_eq!(place(&code, FREE), Placement::entry(Reason::LoopsBack));
        }
    }

    /// A jump through a table may lead anywhere; a tail call of a function pointer leaves the function.
    #[test]
    fn a_jump_table_rules_out_all_but_the_entry() {
        let start = [0x48, 0x85, 0xff, 0x74, 0x20];
        let tables: [&[u8]; 4] = [
            &[0x48, 0x63, 0x04, 0x82, 0x48, 0x01, 0xd0, 0xff, 0xe0], // movslq (%rdx,%rax,4),%rax; add %rdx,%rax; jmp *%rax
            &[0x48, 0x63, 0x04, 0x82, 0x48, 0x01, 0xd0, 0x3e, 0xff, 0xe0], // ... notrack
            &[0xff, 0x24, 0xc5, 0, 0x10, 0, 0],                      // jmp *0x1000(,%rax,8)
            &[0x4a, 0x8b, 0x04, 0xc2, 0xff, 0xe0],                   // mov (%rdx,%r8,8),%rax; jmp *%rax
        ];
        for table in tables {
            assert_eq!(place(&[&start, table].concat(), FREE), Placement::entry(Reason::Unprovable), "{table:x?}");
        }
        let calls: [&[u8]; 3] = [
            &[0x48, 0x8b, 0x47, 0x18, 0xff, 0xe0], // mov 0x18(%rdi),%rax; jmp *%rax
            &[0xff, 0x67, 0x18],                   // jmp *0x18(%rdi)
            &[0xff, 0x25, 0, 0x10, 0, 0],          // jmp *0x1000(%rip)
        ];
        for call in calls {
            assert_eq!(place(&[&start, call].concat(), FREE), Placement::emulated(3, 0), "{call:x?}");
        }
    }

    /// Of a function that is larger than what is read, a jump back may be in the rest.
    #[test]
    fn a_function_that_is_not_known_whole_keeps_its_entry() {
        let mut code = vec![0x48, 0x85, 0xff, 0x74, 0x02];
        code.resize(MAX_WHOLE_FUNCTION - 1, 0xc3);
        assert_eq!(place(&code, FREE), Placement::emulated(3, 0));
        code.push(0xc3);
        assert_eq!(place(&code, FREE), Placement::entry(Reason::Unprovable));
    }

    /// Garbage, cut instructions, and functions without an emulated instruction.
    #[test]
    fn nothing_better_leaves_the_entry_and_says_why() {
        let cases: [(&[u8], Reason); 7] = [
            (&[0x06, 0x06], Reason::Undecodable),
            (&[0x48, 0x85, 0xff, 0x0f, 0x84, 0x10, 0, 0], Reason::Undecodable), // the je lacks a byte
            (&[0x48], Reason::Undecodable),
            (&[0xc3], Reason::BlockEnded),
            (&[0x48, 0x85, 0xff], Reason::BlockEnded), // the function ends
            (&[0xf4, 0x53], Reason::BlockEnded),       // hlt
            (&[0x0f, 0x05, 0x53], Reason::BlockEnded), // syscall
        ];
        for (code, reason) in cases {
            assert_eq!(place(code, MALLOC), Placement::entry(reason), "{code:x?}");
        }
    }

    /// Any bytes get an answer inside them: no panic, no offset beyond the code, none inside the first instruction.
    #[test]
    fn random_bytes_are_answered() {
        let mut state = 0x2545_f491_4f6c_dd1d_u64;
        for round in 0..100_003_u64 {
            let code: Vec<u8> = (0..round % 41)
                .map(|_| {
                    state ^= state << 13;
                    state ^= state >> 7;
                    state ^= state << 17;
                    state as u8
                })
                .collect();
            let needs = Needs { arguments: (round % 64) as u8, returns: round % 2 == 0 };
            let place = place(&code, needs);
            assert!(place.offset == 0 || place.offset < code.len() as u64, "{code:x?}: {place:?}");
            assert_eq!(place.emulated, place.reason.is_none());
            assert!(!needs.returns || place.sp_offset == 0, "{code:x?}: {place:?}");
            let first = Decoder::with_ip(64, &code, 0, DecoderOptions::NONE).decode().next_ip();
            assert!(place.offset == 0 || place.offset >= first, "{code:x?}: {place:?}");
        }
    }
}
