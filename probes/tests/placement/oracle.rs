//! Where a probe may go, worked out anew from `objdump`'s text and the kernel's rules.

use crate::disassembly::{File, Function, Instruction};
use memleak_probes::placement::{Needs, Placement};

/// What a kernel does about the instruction under a uprobe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernel {
    Emulates,
    SingleSteps,
    Refuses,
}

/// What Linux 5.10 and 7.2 do: the order of decisions of `arch_uprobe_analyze_insn`.
pub fn kernels(bytes: &[u8]) -> [Kernel; 2] {
    use Kernel::{Emulates, Refuses, SingleSteps};
    let (mut at, mut operand_size, mut rex) = (0, false, None);
    while let Some(prefix) = bytes.get(at) {
        match prefix {
            0x26 | 0x2e | 0x36 | 0x3e | 0xf0 => return [Refuses; 2],
            0x66 => operand_size = true,
            0x64 | 0x65 | 0x67 | 0xf2 | 0xf3 => {}
            _ => break,
        }
        at += 1;
    }
    if let Some(0x40..=0x4f) = bytes.get(at) {
        rex = Some(bytes[at]);
        at += 1;
    }
    let branch = if operand_size { [Refuses; 2] } else { [Emulates; 2] };
    match bytes[at..] {
        [0x90, ..] if operand_size => [Refuses, Emulates],
        // `pause` and `xchg %r8,%rax` are not nops, and not all kernels know.
        [0x90, ..] if at > 0 => [SingleSteps; 2],
        [0x90, ..] => [Emulates; 2],
        [0x70..=0x7f | 0xe8 | 0xe9 | 0xeb, ..] | [0x0f, 0x80..=0x8f, ..] => branch,
        [0x0f, 0x1f, ..] => [SingleSteps, Emulates],
        [0x50..=0x57, ..] => match (bytes.len(), rex) {
            (1, None) | (2, Some(0x41)) => [Emulates; 2],
            _ => [SingleSteps; 2],
        },
        [0x06 | 0x07 | 0x0e | 0x16 | 0x17 | 0x1e | 0x1f | 0x27 | 0x2f | 0x37 | 0x3f | 0x60..=0x62, ..] => [Refuses; 2],
        [0x6c..=0x6f | 0x82 | 0x9a | 0xcc..=0xcf | 0xd4..=0xd6 | 0xe4..=0xe7 | 0xea | 0xec..=0xef, ..] => [Refuses; 2],
        [0xf1 | 0xf4 | 0xfa | 0xfb, ..] => [Refuses; 2],
        [0x0f, 0x05 | 0x0b | 0x34 | 0x35 | 0xae, ..] => [Refuses; 2],
        _ => [SingleSteps; 2],
    }
}

/// The registers of the six arguments by all their names, and the stack pointer as the seventh.
const NAMES: [&[&str]; 7] = [
    &["rdi", "edi", "di", "dil"],
    &["rsi", "esi", "si", "sil"],
    &["rdx", "edx", "dx", "dl", "dh"],
    &["rcx", "ecx", "cx", "cl", "ch"],
    &["r8", "r8d", "r8w", "r8b"],
    &["r9", "r9d", "r9w", "r9b"],
    &["rsp", "esp", "sp", "spl"],
];
const DI: u8 = 0b1;
const SI: u8 = 0b10;
const DX: u8 = 0b100;
const CX: u8 = 0b1000;
const SP: u8 = 1 << 6;

fn register(operand: &str) -> u8 {
    let Some(name) = operand.strip_prefix('%') else { return 0 };
    NAMES.iter().position(|names| names.contains(&name)).map_or(0, |n| 1 << n)
}

/// The registers of [`NAMES`] that it writes, a bit each.
pub fn written(instruction: &Instruction) -> u8 {
    let Instruction { mnemonic, operands, prefixes, .. } = instruction;
    let is = |list: &[&str]| list.contains(&mnemonic.as_str());
    let starts = |list: &[&str]| list.iter().any(|m| mnemonic.starts_with(m));
    let last = operands.last().map_or(0, |o| register(o));
    let all = operands.iter().fold(0, |mask, o| mask | register(o));
    let single = operands.len() == 1;
    let points = |at: &str| operands.iter().any(|o| o.starts_with(at));
    let (to, from) = (points("%es:(%rdi)"), points("%ds:(%rsi)"));
    if to || from {
        let repeats = prefixes.iter().any(|p| p.starts_with("rep"));
        return if to { DI } else { 0 } | if from { SI } else { 0 } | if repeats { CX } else { 0 };
    }
    if starts(&["push"]) {
        return SP;
    }
    if starts(&["pop"]) && !starts(&["popcnt"]) || is(&["enter", "leave"]) {
        return SP | last;
    }
    if is(&["cmp", "cmpb", "cmpw", "cmpl", "cmpq", "test", "testb", "testw", "testl", "testq", "bt", "btl", "btq"])
        || starts(&["nop", "endbr", "ucomi", "comi", "vucomi", "vcomi", "prefetch", "ptest", "vptest", "wrfsbase"])
    {
        return 0;
    }
    if single && starts(&["mul", "imul", "div", "idiv"]) {
        return DX;
    }
    if is(&["cltd", "cqto", "cwtd", "rdtsc", "rdtscp", "cpuid", "xgetbv", "rdpkru", "rdpmc", "syscall"]) {
        return DX | CX;
    }
    if starts(&["xchg", "xadd"]) {
        // `xchg %ax,%ax` is a nop.
        return if operands.first() == operands.last() { 0 } else { all };
    }
    if starts(&["cmpxchg", "mulx"]) {
        return all | DX;
    }
    last
}

/// By argument: the names of the registers that hold it.
type Holders = [Vec<String>; 6];

fn at_entry() -> Holders {
    std::array::from_fn(|n| vec![NAMES[n][0].to_owned()])
}

/// Names of the general-purpose registers by the processor's numbers.
const NUMBERS: [&str; 16] =
    ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"];

/// The 64-bit register that a name is a part of.
fn whole(name: &str) -> String {
    let numbered = |n: &str| n.trim_end_matches(['d', 'w', 'b']).to_owned();
    match name {
        "eax" | "ax" | "al" | "ah" => "rax".into(),
        "ebx" | "bx" | "bl" | "bh" => "rbx".into(),
        "ebp" | "bp" | "bpl" => "rbp".into(),
        n if n.starts_with('r') && n.as_bytes().get(1).is_some_and(u8::is_ascii_digit) => numbered(n),
        n => NAMES.iter().find(|names| names.contains(&n)).map_or(n, |names| names[0]).to_owned(),
    }
}

/// Follows an instruction: what it writes holds no argument any more, unless it copies one there.
fn follow(holders: &mut Holders, instruction: &Instruction) {
    let mask = written(instruction);
    let named = |operand: &String| operand.strip_prefix('%').map(whole);
    let last = instruction.operands.last().and_then(named);
    let first = instruction.operands.first().and_then(named);
    let copied = (instruction.mnemonic == "mov" && instruction.bytes.first().is_some_and(|b| b & 0xf8 == 0x48))
        .then(|| holders.iter().position(|h| first.as_ref().is_some_and(|f| h.contains(f))))
        .flatten();
    let reads_only = ["cmp", "test", "bt", "push", "nop", "endbr", "ucomi", "comi", "prefetch", "ptest"];
    let single = instruction.operands.len() == 1;
    let products = ["mul", "imul", "div", "idiv"].iter().any(|p| instruction.mnemonic.starts_with(p)) && single;
    let hidden = ["cltd", "cqto", "cwtd", "cltq", "cwtl", "cbtw", "cpuid", "rdtsc", "lods", "cmpxchg", "xgetbv", "rdp"];
    for (n, registers) in holders.iter_mut().enumerate() {
        registers.retain(|register| {
            let hit = NAMES.iter().position(|names| names[0] == register).is_some_and(|at| mask & (1 << at) != 0);
            // A product's only operand is a factor; where the product goes is not named.
            let named = Some(register) == last.as_ref()
                && !products
                && !reads_only.iter().any(|p| instruction.mnemonic.starts_with(p));
            let swapped = ["xchg", "xadd", "cmpxchg", "mulx"].iter().any(|p| instruction.mnemonic.starts_with(p))
                && instruction.operands.iter().filter_map(|o| o.strip_prefix('%')).any(|o| whole(o) == *register);
            let hides = hidden.iter().any(|p| instruction.mnemonic.starts_with(p));
            let implied =
                register == "rax" && (products || hides) || register == "rbx" && instruction.mnemonic == "cpuid";
            !(hit || named || swapped || implied)
        });
        if copied == Some(n)
            && let Some(last) = &last
            && !registers.contains(last)
        {
            registers.push(last.clone());
        }
    }
}

/// True when every argument of the mask is held somewhere.
fn held(holders: &Holders, mask: u8) -> bool {
    (0..6).all(|n| mask & (1 << n) == 0 || !holders[n].is_empty())
}

fn ends_block(instruction: &Instruction) -> bool {
    let m = instruction.mnemonic.as_str();
    ["j", "call", "ret", "loop", "iret", "xbegin", "xabort", "int"].iter().any(|p| m.starts_with(p))
        || matches!(m, "hlt" | "ud0" | "ud1" | "ud2" | "syscall" | "sysenter" | "(bad)" | "")
}

/// How far it moves the stack pointer down; `None` when unclear.
fn growth(instruction: &Instruction) -> Option<u64> {
    if instruction.mnemonic.starts_with("push") {
        return (!instruction.bytes.starts_with(&[0x66])).then_some(8);
    }
    if written(instruction) & SP == 0 {
        return Some(0);
    }
    let immediate = instruction.operands.first()?.strip_prefix("$0x")?;
    let bytes = u64::from_str_radix(immediate, 16).ok().filter(|n| *n < 1 << 31)?;
    (instruction.mnemonic == "sub").then_some(bytes)
}

/// The first instruction of a function that qualifies: its offset and how deep the stack is there.
pub fn best(file: &File, function: &Function, needs: Needs) -> Option<(u64, u64)> {
    let (start, end) = (function.start, function.end);
    let (mut at, mut depth, mut holders) = (start, 0, at_entry());
    while at < end && !(needs.returns && depth != 0) {
        let instruction = file.instructions.get(&at)?;
        if instruction.end() > end {
            return None;
        }
        let call = instruction.mnemonic.starts_with("call");
        let ambiguous = instruction.bytes == [0xeb, 8] || instruction.prefixes.iter().any(|p| p == "bnd");
        if kernels(&instruction.bytes) == [Kernel::Emulates; 2] && !call && !ambiguous {
            let looped = at > start && file.jumps_into(start + 1, at).any(|from| (start..end).contains(&from));
            return (!looped).then_some((at - start, depth));
        }
        follow(&mut holders, instruction);
        if ends_block(instruction) || !held(&holders, needs.arguments) {
            return None;
        }
        depth += growth(instruction)?;
        at = instruction.end();
    }
    None
}

/// What is wrong with a place in a function; nothing is `None`.
pub fn fault(file: &File, function: &Function, place: Placement, needs: Needs) -> Option<String> {
    let Placement { offset, sp_offset: depth, .. } = place;
    let start = function.start;
    let (mut at, mut down, mut holders) = (start, 0, at_entry());
    while at < start + offset {
        let Some(instruction) = file.instructions.get(&at) else { return Some(format!("no instruction at {at:#x}")) };
        if ends_block(instruction) {
            return Some(format!("the first block ends at {at:#x} ({})", instruction.mnemonic));
        }
        follow(&mut holders, instruction);
        if !held(&holders, needs.arguments) {
            return Some(format!("an argument is lost at {at:#x} ({})", instruction.mnemonic));
        }
        match growth(instruction) {
            Some(bytes) => down += bytes,
            None => return Some(format!("the stack pointer changes at {at:#x}")),
        }
        at = instruction.end();
    }
    if at != start + offset || !file.instructions.contains_key(&at) {
        return Some(format!("{:#x} is inside an instruction", start + offset));
    }
    for n in (0..6).filter(|n| needs.arguments & (1 << n) != 0) {
        let told = NUMBERS[usize::from(place.register(n))];
        if !holders[usize::from(n)].iter().any(|register| register == told) {
            return Some(format!("argument {n} is in {:?}, not in {told}", holders[usize::from(n)]));
        }
    }
    if down != depth {
        return Some(format!("the stack pointer is {down} bytes down, not {depth}"));
    }
    if needs.returns && down != 0 {
        return Some("the return address is not on top of the stack".to_owned());
    }
    // A range without a name may be a cold part of a function, to which the function jumps where it likes.
    let others = |from: &u64| !function.name.is_empty() || (start..function.end).contains(from);
    let from = file.jumps_into(start + 1, at).find(others)?;
    Some(format!("{from:#x} leads between the entry and the probe"))
}

/// True when all kernels take a probe there, or none takes one at the entry either.
pub fn is_accepted(file: &File, function: &Function, offset: u64) -> bool {
    let refused = |address| {
        let instruction: Option<&Instruction> = file.instructions.get(&address);
        instruction.is_none_or(|i| kernels(&i.bytes).contains(&Kernel::Refuses))
    };
    !refused(function.start + offset) || offset == 0
}
