//! Names of the kernel's code, its modules included.
//!
//! Read from `/proc/kallsyms` when modules come or go, and when programs of ours have been loaded, which are
//! listed there, too. What a module was called is kept after it was unloaded, until another one takes its place: its blocks
//! may outlive it.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};

use globset::GlobSet;

use crate::{Error, ErrorKind, Result};

const PATH: &str = "/proc/kallsyms";
const MODULES: &str = "/proc/modules";
/// A kernel has some hundred thousand symbols, of some 50 bytes each.
const MAX_BYTES: u64 = 256 << 20;
/// No function is larger: what lies further behind the start of one is something else.
const MAX_FUNCTION: u64 = 1 << 20;
/// What the kernel itself is called where modules have a name.
pub const KERNEL: &str = "vmlinux";

/// One function.
#[derive(Clone, Copy, Debug)]
struct Symbol {
    address: u64,
    /// Where its name is.
    name: (u32, u32),
    /// Number of the module, in the list of modules.
    module: u32,
}

/// Symbols of the kernel, by address.
#[derive(Debug, Default)]
pub struct Kallsyms {
    symbols: Vec<Symbol>,
    names: String,
    /// The first is the kernel itself.
    modules: Vec<String>,
    /// Where loaded modules begin and end, by name.
    spans: HashMap<String, (u64, u64)>,
    /// What `/proc/modules` said when the symbols were read.
    loaded: Vec<u8>,
    /// Why there are no names; `None` when there are.
    missing: Option<String>,
}

/// A place in the kernel's code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place<'a> {
    /// Name of the function.
    pub function: &'a str,
    /// Bytes from its start.
    pub offset: u64,
    /// Name of the module, or [`KERNEL`].
    pub module: &'a str,
}

impl Kallsyms {
    /// Reads the symbols of the running kernel. When they cannot be read, or are hidden from us, nothing has a name;
    /// [`Kallsyms::missing`] says why.
    pub fn read() -> Self {
        let mut symbols = Kallsyms::default();
        symbols.refresh();
        symbols
    }

    /// Why there are no names.
    pub fn missing(&self) -> Option<&str> {
        self.missing.as_deref()
    }

    /// Reads the symbols again if modules have come or gone; true when that was so.
    pub fn refresh(&mut self) -> bool {
        let modules = read_some(MODULES).unwrap_or_default();
        // Symbols that could not be read are not tried again each time: they are many.
        let has_tried = self.missing.is_some() || !self.symbols.is_empty();
        if has_tried && names_and_places(&modules) == self.loaded {
            return false;
        }
        self.load(&modules);
        true
    }

    /// Reads the symbols again, because code has come that is in no module.
    pub fn reread(&mut self) {
        self.load(&read_some(MODULES).unwrap_or_default());
    }

    fn load(&mut self, modules: &[u8]) {
        // Memory use and state in it change without any code coming or going.
        self.loaded = names_and_places(modules);
        match File::open(PATH).map_err(|e| Error::io(format!("failed to read {PATH}"), e)).and_then(parse) {
            Ok(fresh) => {
                let loaded = std::mem::take(&mut self.loaded);
                let gone = std::mem::replace(self, Kallsyms { loaded, spans: spans(modules), ..fresh });
                self.keep_gone(&gone);
                self.missing = None;
            }
            Err(e) => self.missing = Some(format!("{e:#}")),
        }
    }

    /// Takes over symbols of modules that are gone, where nothing new has been put.
    fn keep_gone(&mut self, before: &Kallsyms) {
        let kept: Vec<Symbol> = before
            .symbols
            .iter()
            .filter(|s| s.module > 0)
            .filter(|s| {
                let module = &before.modules[s.module as usize];
                !self.modules.iter().any(|m| m == module) && self.module_at(s.address).is_none()
            })
            .copied()
            .collect();
        for symbol in kept {
            let name = before.name(symbol);
            let module = &before.modules[symbol.module as usize];
            let number = number_of(&mut self.modules, module);
            let start = self.names.len() as u32;
            self.names.push_str(name);
            self.symbols.push(Symbol {
                address: symbol.address,
                name: (start, self.names.len() as u32),
                module: number,
            });
        }
        self.symbols.sort_by_key(|s| s.address);
    }

    /// The loaded module that an address belongs to, by its neighbours: between two symbols of one module.
    fn module_at(&self, address: u64) -> Option<u32> {
        let at = self.symbols.partition_point(|s| s.address <= address);
        let (before, after) = (self.symbols.get(at.checked_sub(1)?)?, self.symbols.get(at)?);
        (before.module == after.module && before.module > 0).then_some(before.module)
    }

    fn name(&self, symbol: Symbol) -> &str {
        self.names.get(symbol.name.0 as usize..symbol.name.1 as usize).unwrap_or("?")
    }

    /// What lies at an address; `None` outside of all code.
    pub fn find(&self, address: u64) -> Option<Place<'_>> {
        let at = self.symbols.partition_point(|s| s.address <= address).checked_sub(1)?;
        let last = *self.symbols.get(at)?;
        // Of several names of one function the first one that was listed.
        let first = self.symbols[..at].iter().rev().take_while(|s| s.address == last.address).last().copied();
        let symbol = first.unwrap_or(last);
        let offset = address - symbol.address;
        let module = self.modules.get(symbol.module as usize).map_or(KERNEL, String::as_str);
        let is_behind =
            |(start, end): &(u64, u64)| symbol.address >= *start && symbol.address < *end && address >= *end;
        if offset >= MAX_FUNCTION || self.spans.get(module).is_some_and(is_behind) {
            return None;
        }
        Some(Place { function: self.name(symbol), offset, module })
    }

    /// Addresses of functions of the kernel itself, those that it has.
    pub fn addresses<'a>(&self, names: impl Iterator<Item = &'a String>) -> Vec<(String, u64)> {
        let mut wanted: HashMap<&str, Option<u64>> = names.map(|n| (n.as_str(), None)).collect();
        for symbol in self.symbols.iter().filter(|s| s.module == 0) {
            if let Some(found) = wanted.get_mut(self.name(*symbol)) {
                *found = Some(symbol.address);
            }
        }
        wanted.into_iter().filter_map(|(name, address)| Some((name.to_owned(), address?))).collect()
    }

    /// Start and end of every function whose name matches, at most `most` of them; and how many more there are.
    pub fn ranges(&self, names: &GlobSet, most: usize) -> (Vec<(u64, u64)>, usize) {
        let mut ranges: Vec<(u64, u64)> = Vec::new();
        let mut left_out = 0;
        for (at, symbol) in self.symbols.iter().enumerate() {
            if symbol.module > 0 || !names.is_match(self.name(*symbol)) {
                continue;
            }
            let Some(end) = self.symbols[at..].iter().find(|s| s.address > symbol.address) else { continue };
            if let Some(last) = ranges.last_mut().filter(|last| last.1 >= symbol.address) {
                last.1 = end.address;
            } else if ranges.len() < most {
                ranges.push((symbol.address, end.address));
            } else {
                left_out += 1;
            }
        }
        (ranges, left_out)
    }
}

/// Number of a module, which is added when it is new.
fn number_of(modules: &mut Vec<String>, name: &str) -> u32 {
    let at = modules.iter().position(|m| m == name).unwrap_or_else(|| {
        modules.push(name.to_owned());
        modules.len() - 1
    });
    at as u32
}

fn read_some(path: &str) -> std::io::Result<Vec<u8>> {
    let mut data = Vec::new();
    File::open(path)?.take(MAX_BYTES).read_to_end(&mut data)?;
    Ok(data)
}

/// First and last field of each line of `/proc/modules`: name and address.
fn names_and_places(modules: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    for line in modules.split(|b| *b == b'\n') {
        let mut fields = line.split(|b| *b == b' ').filter(|f| !f.is_empty());
        out.extend_from_slice(fields.next().unwrap_or_default());
        out.push(b' ');
        out.extend_from_slice(fields.find(|f| f.starts_with(b"0x")).unwrap_or_default());
        out.push(b'\n');
    }
    out
}

/// Where each module of `/proc/modules` begins and ends: name, bytes, four more fields.
fn spans(modules: &[u8]) -> HashMap<String, (u64, u64)> {
    let text = String::from_utf8_lossy(modules);
    let span = |line: &str| {
        let mut fields = line.split_ascii_whitespace();
        let (name, bytes) = (fields.next()?, fields.next()?.parse::<u64>().ok()?);
        let start = u64::from_str_radix(fields.find_map(|f| f.strip_prefix("0x"))?, 16).ok()?;
        Some((name.to_owned(), (start, start.checked_add(bytes)?)))
    };
    text.lines().filter_map(span).collect()
}

/// Symbols of code, by address.
fn parse(source: impl Read) -> Result<Kallsyms> {
    let mut found = Kallsyms { modules: vec![KERNEL.to_owned()], ..Kallsyms::default() };
    let mut hidden = true;
    for line in BufReader::new(source.take(MAX_BYTES)).lines() {
        let line = line.map_err(|e| Error::io(format!("failed to read {PATH}"), e))?;
        let mut fields = line.split_ascii_whitespace();
        let (Some(address), Some(kind), Some(name)) = (fields.next(), fields.next(), fields.next()) else { continue };
        let Ok(address) = u64::from_str_radix(address, 16) else { continue };
        if !matches!(kind, "t" | "T" | "w" | "W") {
            continue;
        }
        hidden &= address == 0;
        let module = match fields.next().and_then(|m| m.strip_prefix('[')?.strip_suffix(']')) {
            Some(module) => number_of(&mut found.modules, module),
            None => 0,
        };
        let start = found.names.len() as u32;
        found.names.push_str(name);
        found.symbols.push(Symbol { address, name: (start, found.names.len() as u32), module });
    }
    if hidden {
        return Err(Error::new(
            ErrorKind::Permission,
            format!(
                "{PATH} hides the kernel's addresses: run memleak as root or with CAP_SYSLOG, and set \
                 kernel.kptr_restrict to 0 or 1 (sysctl kernel.kptr_restrict=1)"
            ),
        ));
    }
    // Stable: of several names of one address the first stays first.
    found.symbols.sort_by_key(|s| s.address);
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "ffffffff81000000 T start\nffffffff81000100 t allocate_slab\nffffffff81000100 t other_name\n\
                        ffffffff81000200 D data\nffffffff81000300 t last\nffffffffc0000000 t leaky_path\t[leakmod]\n\
                        ffffffffc0000080 t leaky_work\t[leakmod]\nffffffffc0001000 t net_poll\t[net]\n";

    fn symbols(text: &str) -> Kallsyms {
        parse(text.as_bytes()).expect("readable")
    }

    /// A frame is named by the function that holds it, and its module.
    #[test]
    fn addresses_have_function_and_module() {
        let symbols = symbols(TEXT);
        let place = symbols.find(0xffff_ffff_8100_0110).expect("known");
        assert_eq!((place.function, place.offset, place.module), ("allocate_slab", 0x10, KERNEL));
        let place = symbols.find(0xffff_ffff_c000_0084).expect("known");
        assert_eq!((place.function, place.offset, place.module), ("leaky_work", 4, "leakmod"));
        assert!(symbols.find(0x1000).is_none());
    }

    /// Blocks outlive the module that allocated them: the report must still say whose they are.
    #[test]
    fn a_module_keeps_its_name_after_it_is_unloaded() {
        let before = symbols(TEXT);
        let mut after = symbols(&TEXT.lines().filter(|l| !l.contains("leakmod")).collect::<Vec<_>>().join("\n"));
        after.keep_gone(&before);
        assert_eq!(after.find(0xffff_ffff_c000_0010).expect("kept").module, "leakmod");
        assert_eq!(after.find(0xffff_ffff_c000_1010).expect("loaded").module, "net");
    }

    /// Code that came after the symbols were read, as a BPF program does, is not what happens to lie before it.
    #[test]
    fn code_far_behind_a_function_or_behind_its_module_has_no_name() {
        let mut symbols = symbols(TEXT);
        assert!(symbols.find(0xffff_ffff_8120_0000).is_none());
        let behind = 0xffff_ffff_c000_1000 + 0x800;
        assert_eq!(symbols.find(behind).expect("in reach").function, "net_poll");
        symbols.spans =
            spans(b"net 1024 0 - Live 0xffffffffc0001000\nleakmod 256 1 net, Live 0xffffffffc0000000 (O)\n");
        assert_eq!(symbols.spans.len(), 2);
        assert!(symbols.find(behind).is_none());
        assert_eq!(symbols.find(0xffff_ffff_c000_1010).expect("inside").function, "net_poll");
    }

    /// Symbols that are hidden are hundreds of thousands of lines that say nothing: not to be read in every tick.
    #[test]
    fn hidden_symbols_are_not_read_again_and_again() {
        let loaded = names_and_places(&read_some(MODULES).unwrap_or_default());
        let mut hidden = Kallsyms { missing: Some("hidden".into()), loaded, ..Kallsyms::default() };
        assert!(!hidden.refresh());
        assert!(Kallsyms::default().refresh());
    }

    /// Zeros in place of addresses name nothing, and the message says what to do.
    #[test]
    fn hidden_addresses_are_named_with_the_fix() {
        let error = parse(&b"0000000000000000 T start\n0000000000000000 t other\n"[..]).expect_err("hidden");
        assert!(error.to_string().contains("kptr_restrict"), "{error}");
    }

    /// Code that allocates pages for another allocator is found by its names.
    #[test]
    fn ranges_of_functions_end_where_the_next_begins() {
        let names = globset::GlobSetBuilder::new().add(globset::Glob::new("allocate_slab*").expect("glob")).build();
        let names = names.expect("set");
        let (ranges, left_out) = symbols(TEXT).ranges(&names, 8);
        assert_eq!((ranges.as_slice(), left_out), (&[(0xffff_ffff_8100_0100, 0xffff_ffff_8100_0300)][..], 0));
        assert_eq!(symbols(TEXT).ranges(&names, 0), (Vec::new(), 1));
    }
}
