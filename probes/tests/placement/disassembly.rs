//! A file's machine code as `objdump` reads it, and its functions as `nm` and the unwind tables name them.
//!
//! Knows nothing of the code under test and shares no decoder with it.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

/// One line of `objdump -d`.
pub struct Instruction {
    /// Address in the file's own address space.
    pub address: u64,
    /// Its encoding.
    pub bytes: Vec<u8>,
    /// `rep`, `lock`, `bnd` and the like.
    pub prefixes: Vec<String>,
    /// AT&T mnemonic.
    pub mnemonic: String,
    /// AT&T operands, the destination last.
    pub operands: Vec<String>,
}

impl Instruction {
    pub fn end(&self) -> u64 {
        self.address + self.bytes.len() as u64
    }

    /// Where a direct jump or call leads.
    pub fn target(&self) -> Option<u64> {
        let leaves = ["j", "call", "loop", "xbegin"].iter().any(|m| self.mnemonic.starts_with(m));
        let operand = self.operands.first().filter(|_| leaves)?;
        u64::from_str_radix(operand, 16).ok()
    }
}

/// A range of code that something calls a function.
pub struct Function {
    /// Empty when only the unwind tables know of it.
    pub name: String,
    pub start: u64,
    pub end: u64,
}

/// A disassembled file.
pub struct File {
    /// By address.
    pub instructions: BTreeMap<u64, Instruction>,
    /// By name, then by address.
    pub functions: Vec<Function>,
    /// Targets of all direct jumps and calls: where they lead, where they are.
    pub targets: Vec<(u64, u64)>,
}

fn output(program: &str, arguments: &[&str], path: &Path) -> String {
    let out = Command::new(program).args(arguments).arg(path).output().unwrap_or_else(|e| panic!("{program}: {e}"));
    // readelf's exit status also speaks of debug files that it would like to have.
    assert!(out.status.success() || program == "readelf", "{program} failed on {}", path.display());
    String::from_utf8_lossy(&out.stdout).into_owned()
}

fn hex(text: &str) -> Option<u64> {
    u64::from_str_radix(text, 16).ok()
}

impl File {
    pub fn read(path: &Path) -> File {
        let mut instructions = BTreeMap::new();
        for line in output("objdump", &["-d", "-w", "-z"], path).lines() {
            if let Some(instruction) = parse(line) {
                instructions.insert(instruction.address, instruction);
            }
        }
        let mut targets: Vec<(u64, u64)> =
            instructions.values().filter_map(|i: &Instruction| Some((i.target()?, i.address))).collect();
        targets.sort_unstable();
        File { functions: functions(path), instructions, targets }
    }

    /// The code of a range; `None` when it is not all code.
    pub fn code(&self, start: u64, end: u64) -> Option<Vec<u8>> {
        let mut code = Vec::new();
        for instruction in self.instructions.range(start..end).map(|(_, i)| i) {
            (instruction.address == start + code.len() as u64).then_some(())?;
            code.extend_from_slice(&instruction.bytes);
        }
        let whole = usize::try_from(end - start).ok()?;
        (code.len() >= whole).then(|| code[..whole].to_vec())
    }

    /// Jumps and calls that lead into a range: their addresses.
    pub fn jumps_into(&self, from: u64, to: u64) -> impl Iterator<Item = u64> {
        let first = self.targets.partition_point(|t| t.0 < from);
        self.targets[first..].iter().take_while(move |t| t.0 <= to).map(|t| t.1)
    }
}

fn parse(line: &str) -> Option<Instruction> {
    let mut parts = line.split('\t');
    let address = hex(parts.next()?.trim().strip_suffix(':')?)?;
    let bytes =
        parts.next()?.split_ascii_whitespace().map(|b| u8::from_str_radix(b, 16).ok()).collect::<Option<_>>()?;
    let text = parts.next().unwrap_or_default();
    let text = text.split(" #").next().unwrap_or_default();
    let mut words = text.split_ascii_whitespace().peekable();
    let mut prefixes = Vec::new();
    let is_prefix = |w: &str| {
        matches!(
            w,
            "rep" | "repz" | "repnz" | "lock" | "bnd" | "notrack" | "data16" | "addr32" | "cs" | "ds" | "es" | "ss"
        ) || w == "fs"
            || w == "gs"
            || w.starts_with("rex")
            || w.starts_with('{')
    };
    while let Some(word) = words.next_if(|w| is_prefix(w)) {
        prefixes.push(word.to_owned());
    }
    // A branch hint is part of the mnemonic: `jne,pt`.
    let mnemonic = words.next().unwrap_or_default().split(',').next().unwrap_or_default().to_owned();
    let mut operands = vec![String::new()];
    let mut depth = 0;
    for c in words.next().unwrap_or_default().chars() {
        depth += i32::from(c == '(') - i32::from(c == ')');
        match operands.last_mut() {
            Some(last) if c != ',' || depth > 0 => last.push(c),
            _ => operands.push(String::new()),
        }
    }
    operands.retain(|o| !o.is_empty());
    Some(Instruction { address, bytes, prefixes, mnemonic, operands })
}

/// Functions with a size in the symbol tables, and the ranges that the unwind tables describe: those know the
/// functions without a symbol too.
fn functions(path: &Path) -> Vec<Function> {
    let mut out = Vec::new();
    for table in [&["-S", "--defined-only"][..], &["-S", "--defined-only", "-D"]] {
        for line in output("nm", table, path).lines() {
            let fields: Vec<&str> = line.split_ascii_whitespace().collect();
            if let [start, size, "t" | "T" | "w" | "W", name] = fields[..]
                && let (Some(start), Some(size)) = (hex(start), hex(size))
                && size > 0
            {
                out.push(Function { name: name.to_owned(), start, end: start + size });
            }
        }
    }
    for line in output("readelf", &["--wide", "--debug-dump=frames"], path).lines() {
        if let Some((_, range)) = line.split_once(" FDE cie=").and_then(|(_, rest)| rest.split_once("pc="))
            && let Some((start, end)) = range.split_once("..")
            && let (Some(start), Some(end)) = (hex(start.trim()), hex(end.trim()))
        {
            out.push(Function { name: String::new(), start, end });
        }
    }
    // Of one range the named entry stays.
    out.sort_by_key(|f| (f.start, f.end, f.name.is_empty()));
    out.dedup_by_key(|f| (f.start, f.end));
    out
}
