//! Names for roots: which global, which thread's stack, or what other memory holds a reference.

use std::collections::HashMap;
use std::fmt;
use std::fs::File;

use object::{Object, ObjectSymbol, ReadCache, SymbolKind};
use serde::{Deserialize, Serialize};

use crate::maps::elf::ElfInfo;
use crate::maps::{Backing, Mapping, Maps, open_mapped};
use crate::process::ProcDir;

/// Largest file whose symbols are read, bytes.
const MAX_FILE: u64 = 1 << 30;
/// Most symbols of variables that are kept of a file.
const MAX_SYMBOLS: usize = 1_000_000;
/// Most bytes of their names that are read, and that are kept of one.
const MAX_NAMES: usize = 32 << 20;
const MAX_NAME: usize = 512;
/// Most threads whose stacks are told apart.
const MAX_THREADS: usize = 4096;

/// Roots that have no address; no program's address has these bits.
const OF_REGISTER: u64 = 1 << 62;
const OF_KERNEL: u64 = 1 << 61;

/// Stands for the registers of a thread where an address is expected.
pub fn of_register(tid: u32) -> u64 {
    OF_REGISTER | u64::from(tid)
}

/// Stands for a word that the kernel keeps.
pub fn of_kernel(number: usize) -> u64 {
    OF_KERNEL | number as u64
}

/// What holds a reference, outside of tracked blocks. Names are hostile text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Root {
    /// A variable of a program or library.
    Global {
        /// Path of the file.
        module: String,
        /// Name of the variable; `None` when the file's symbols do not name it.
        name: Option<String>,
        /// Bytes from the variable's start, or address in the file's own terms without a name.
        offset: u64,
    },
    /// The stack of a thread, or its thread-local memory, which lies beside it.
    Stack {
        /// Thread id; `None` when its stack pointer could not be read.
        tid: Option<u32>,
    },
    /// A register of a thread.
    Register {
        /// Thread id.
        tid: u32,
    },
    /// The kernel, which gives it back: `epoll_wait` or a timer's signal.
    Kernel,
    /// Memory shared with other processes.
    Shared {
        /// Name of the mapping.
        name: String,
    },
    /// Anything else: blocks from before the attach, of allocators that are not watched, or allocators' own books.
    Untracked {
        /// Address.
        address: u64,
    },
}

impl fmt::Display for Root {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Root::Global { module, name: Some(name), offset } => {
                let file = module.rsplit('/').next().unwrap_or(module);
                write!(f, "global {name}")?;
                if *offset > 0 {
                    write!(f, "+{offset:#x}")?;
                }
                write!(f, " ({file})")
            }
            Root::Global { module, name: None, offset } => {
                write!(f, "data of {} at {offset:#x}", module.rsplit('/').next().unwrap_or(module))
            }
            Root::Stack { tid: Some(tid) } => write!(f, "stack or thread-local memory of thread {tid}"),
            Root::Stack { tid: None } => f.write_str("stack or thread-local memory of a thread"),
            Root::Register { tid } => write!(f, "register of thread {tid}"),
            Root::Kernel => f.write_str("data that the kernel keeps for epoll or a timer"),
            Root::Shared { name } => write!(f, "shared memory {name}"),
            Root::Untracked { address } => write!(f, "memory that is not tracked, at {address:#x}"),
        }
    }
}

/// Names the roots of one process at one time.
#[derive(Debug)]
pub struct RootNames {
    dir: ProcDir,
    maps: Maps,
    /// Stack pointers of threads, by thread id.
    stacks: Vec<(u64, u32)>,
    /// Variables of the files looked at so far, by the file's first mapping.
    files: HashMap<u64, Option<Variables>>,
}

/// Where a file's variables are.
#[derive(Debug, Default)]
struct Variables {
    /// Added to an address in the file's terms to get one in the process.
    bias: u64,
    /// Address in the file's terms, size and name; in order.
    symbols: Vec<(u64, u64, String)>,
}

impl RootNames {
    /// Reads what is needed of a process; symbols are read when they are asked for.
    pub fn new(dir: ProcDir, maps: Maps) -> Self {
        let stacks = stack_pointers(&dir);
        RootNames { dir, maps, stacks, files: HashMap::new() }
    }

    /// What lies at an address, or what a number of [`of_register`] or [`of_kernel`] stands for.
    pub fn name(&mut self, address: u64) -> Root {
        if address & OF_REGISTER != 0 {
            return Root::Register { tid: address as u32 };
        }
        if address & OF_KERNEL != 0 {
            return Root::Kernel;
        }
        let Some(at) = self.maps.iter().position(|m| m.contains(address)) else { return Root::Untracked { address } };
        let mapping = &self.maps.iter().as_slice()[at];
        match &mapping.backing {
            Backing::Special(name) if name.starts_with("[stack") => return Root::Stack { tid: Some(self.dir.pid()) },
            Backing::File { .. } if !mapping.perms.shared => return self.global(at, address),
            _ if mapping.perms.shared => {
                return Root::Shared { name: mapping.name().unwrap_or_else(|| "(anonymous)".to_owned()) };
            }
            Backing::Anonymous if self.is_bss(at) => return self.global(at - 1, address),
            _ => {}
        }
        match self.stacks.iter().find(|(sp, _)| mapping.contains(*sp)) {
            Some((_, tid)) => Root::Stack { tid: Some(*tid) },
            None => Root::Untracked { address },
        }
    }

    /// Whether a mapping without a name continues the data of the file before it.
    fn is_bss(&self, at: usize) -> bool {
        let all = self.maps.iter().as_slice();
        at.checked_sub(1).and_then(|before| all.get(before)).is_some_and(|before| {
            before.end == all[at].start && before.perms.write && matches!(before.backing, Backing::File { .. })
        })
    }

    /// The variable at an address that belongs to the file behind mapping `at`.
    fn global(&mut self, at: usize, address: u64) -> Root {
        let all = self.maps.iter().as_slice();
        let mapping = &all[at];
        let module = mapping.name().unwrap_or_default();
        let first = all[..=at].iter().rev().take_while(|m| same_file(m, mapping) || m.name().is_none());
        let first = first.filter(|m| same_file(m, mapping)).last().unwrap_or(mapping);
        let variables = self.files.entry(first.start).or_insert_with(|| read_variables(&self.dir, first)).as_ref();
        let Some(variables) = variables else { return Root::Global { module, name: None, offset: address } };
        let own = address.wrapping_sub(variables.bias);
        match variables.find(own) {
            Some((name, offset)) => Root::Global { module, name: Some(name.to_owned()), offset },
            None => Root::Global { module, name: None, offset: own },
        }
    }
}

impl Variables {
    fn find(&self, address: u64) -> Option<(&str, u64)> {
        let behind = self.symbols.partition_point(|(start, ..)| *start <= address);
        let (start, size, name) = self.symbols.get(behind.checked_sub(1)?)?;
        let offset = address - start;
        (offset < *size).then_some((name, offset))
    }
}

fn same_file(a: &Mapping, b: &Mapping) -> bool {
    a.inode == b.inode && a.dev == b.dev && matches!(a.backing, Backing::File { .. })
}

/// Variables of the file whose first mapping is given; `None` when it cannot be read.
fn read_variables(dir: &ProcDir, first: &Mapping) -> Option<Variables> {
    let file = open_mapped(dir, first).ok()?;
    if file.metadata().ok()?.len() > MAX_FILE {
        return None;
    }
    let info = ElfInfo::read(&file).ok()?;
    let bias = first.start.wrapping_sub(info.address_of(first.offset)?);
    let cache = ReadCache::new(&file as &File);
    let elf = object::File::parse(&cache).ok()?;
    let variables = elf.symbols().chain(elf.dynamic_symbols()).filter(|s| s.kind() == SymbolKind::Data && s.size() > 0);
    let named = variables.take(MAX_SYMBOLS).filter_map(|s| Some((s.address(), s.size(), s.name_bytes().ok()?)));
    Some(Variables { bias, symbols: keep(named) })
}

/// Symbols in order, as many as their names fit. Many may share one long name.
fn keep<'a>(named: impl Iterator<Item = (u64, u64, &'a [u8])>) -> Vec<(u64, u64, String)> {
    let mut room = MAX_NAMES;
    let fitting = named.map_while(|(start, size, name)| {
        room = room.checked_sub(name.len())?;
        Some((start, size, name))
    });
    let text = |name: &[u8]| {
        let name = std::str::from_utf8(name).ok()?;
        Some(name[..name.floor_char_boundary(MAX_NAME)].to_owned())
    };
    let mut symbols: Vec<_> = fitting.filter_map(|(start, size, name)| Some((start, size, text(name)?))).collect();
    symbols.sort_unstable();
    symbols.dedup_by_key(|(start, ..)| *start);
    symbols
}

/// Stack pointers of a process's threads that do not run at the moment (`/proc/PID/task/TID/syscall`).
fn stack_pointers(dir: &ProcDir) -> Vec<(u64, u32)> {
    let pid = dir.pid();
    let Ok(tasks) = std::fs::read_dir(format!("/proc/{pid}/task")) else { return Vec::new() };
    let tids = tasks.filter_map(|t| t.ok()?.file_name().to_str()?.parse::<u32>().ok());
    let pointer = |tid: u32| {
        let text = std::fs::read_to_string(format!("/proc/{pid}/task/{tid}/syscall")).ok()?;
        // "NUMBER ARGS... SP PC", or "-1 SP PC" outside of system calls.
        let sp = text.split_ascii_whitespace().rev().nth(1)?;
        Some((u64::from_str_radix(sp.strip_prefix("0x")?, 16).ok()?, tid))
    };
    tids.take(MAX_THREADS).filter_map(pointer).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[unsafe(no_mangle)]
    static mut MEMLEAK_TEST_VARIABLE: [u64; 4] = [1; 4];
    #[unsafe(no_mangle)]
    static mut MEMLEAK_TEST_ZEROES: [u64; 1000] = [0; 1000];

    fn names() -> RootNames {
        let dir = ProcDir::open(std::process::id()).expect("we run");
        let maps = Maps::read(&dir).expect("ours");
        RootNames::new(dir, maps)
    }

    // Initialised data comes from the file, zeroed data lies behind it.
    #[test]
    fn globals_are_named() {
        let mut names = names();
        let expect = |root: Root, wanted: &str, at: u64| match root {
            Root::Global { name: Some(name), offset, .. } => assert_eq!((name.as_str(), offset), (wanted, at)),
            other => panic!("{other:?}"),
        };
        expect(names.name((&raw const MEMLEAK_TEST_VARIABLE) as u64 + 16), "MEMLEAK_TEST_VARIABLE", 16);
        expect(names.name((&raw const MEMLEAK_TEST_ZEROES) as u64), "MEMLEAK_TEST_ZEROES", 0);
        let shown = names.name((&raw const MEMLEAK_TEST_VARIABLE) as u64 + 16).to_string();
        assert!(shown.starts_with("global MEMLEAK_TEST_VARIABLE+0x10 (memleak_core-"), "{shown}");
    }

    // A file of a few megabytes must not make gigabytes of names.
    #[test]
    fn names_of_variables_are_bounded() {
        let long = vec![b'v'; 1 << 20];
        let symbols = keep((0..1000).rev().map(|n| (n, 1, long.as_slice())));
        assert_eq!(symbols.len(), MAX_NAMES >> 20);
        assert!(symbols.iter().all(|(.., name)| name.len() == MAX_NAME));
        let few: [(u64, u64, &[u8]); 4] = [(9, 1, b"b"), (9, 1, b"a"), (3, 1, b"\xff"), (1, 2, b"c")];
        assert_eq!(keep(few.into_iter()), [(1, 2, "c".to_owned()), (9, 1, "a".to_owned())]);
    }

    // A thread that waits shows where its stack is.
    #[test]
    fn stacks_of_waiting_threads_are_named() {
        let (send, receive) = std::sync::mpsc::channel();
        let (stop, stopped) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            let local = 7_u64;
            // SAFETY: takes nothing, returns a number.
            let tid = unsafe { libc::gettid() };
            send.send(((&raw const local) as u64, tid as u32)).unwrap();
            stopped.recv().ok();
        });
        let (address, tid) = receive.recv().unwrap();
        let mut root = names().name(address);
        for _ in 0..1000 {
            if root == (Root::Stack { tid: Some(tid) }) {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
            root = names().name(address);
        }
        assert_eq!(root, Root::Stack { tid: Some(tid) });
        drop(stop);
        thread.join().unwrap();
        let heap = Box::new(5);
        assert!(matches!(names().name((&raw const *heap) as u64), Root::Untracked { .. } | Root::Stack { .. }));
        assert_eq!(names().name(8), Root::Untracked { address: 8 });
    }
}
