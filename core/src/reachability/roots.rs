//! Names for roots: which global, which thread's stack, or what other memory holds a reference.

use std::collections::HashMap;
use std::fmt;
use std::fs::File;

use object::elf;
use object::endian::Endianness;
use object::pod::{Pod, slice_from_all_bytes};
use object::read::elf::{FileHeader, SectionHeader, Sym};
use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::maps::elf::{self as elf_file, ByClass, ElfInfo, Sections, malformed};
use crate::maps::{Backing, Mapping, Maps, open_mapped};
use crate::output::text::clip_bytes;
use crate::process::ProcDir;

/// Largest file whose symbols are read, bytes.
const MAX_FILE: u64 = 1 << 30;
/// Most symbols of variables that are kept of a file.
const MAX_SYMBOLS: usize = 1_000_000;
/// Most symbols that are looked at in a table.
const MAX_SEEN: usize = 4_000_000;
/// Symbols that are read at once.
const CHUNK: usize = 4096;
/// Most bytes of all names that are kept of a file.
const MAX_NAMES: usize = 32 << 20;
/// Longest name of a variable or file in a [`Root`], bytes.
pub const MAX_NAME: usize = 512;
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
                return Root::Shared { name: mapping.name().map_or_else(|| "(anonymous)".to_owned(), clip_path) };
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
        let module = mapping.name().map(clip_path).unwrap_or_default();
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
    let mut symbols = elf_file::with_class(&file, Symbols { names: MAX_NAMES }).ok()?;
    symbols.sort_unstable();
    symbols.dedup_by_key(|(start, ..)| *start);
    Some(Variables { bias, symbols })
}

/// Reads the symbols of a file's variables, with names of so many bytes in all: many may share one long name.
struct Symbols {
    names: usize,
}

impl ByClass for Symbols {
    type Output = Vec<(u64, u64, String)>;

    fn read<H: FileHeader<Endian = Endianness> + Pod>(self, file: &File, header: &H) -> Result<Self::Output> {
        let endian = header.endian().map_err(|_| malformed("byte order"))?;
        let sections = Sections::<H::SectionHeader>::read(file, header)?.headers;
        let (mut found, mut room) = (Vec::new(), self.names);
        for kind in [elf::SHT_SYMTAB, elf::SHT_DYNSYM] {
            let Some(table) = sections.iter().find(|s| s.sh_type(endian) == kind) else { continue };
            let Some(strings) = sections.get(table.sh_link(endian) as usize) else { continue };
            let (start, len): (u64, u64) = (strings.sh_offset(endian).into(), strings.sh_size(endian).into());
            let (mut offset, size): (u64, u64) = (table.sh_offset(endian).into(), table.sh_size(endian).into());
            let mut left = (size / size_of::<H::Sym>() as u64).min(MAX_SEEN as u64) as usize;
            while left > 0 {
                let bytes = left.min(CHUNK) * size_of::<H::Sym>();
                let chunk = elf_file::read_at(file, offset, bytes as u64, bytes as u64)?;
                let whole = chunk.len() - chunk.len() % size_of::<H::Sym>();
                let symbols =
                    slice_from_all_bytes::<H::Sym>(&chunk[..whole]).map_err(|()| malformed("symbol table"))?;
                for symbol in symbols {
                    let (address, size): (u64, u64) = (symbol.st_value(endian).into(), symbol.st_size(endian).into());
                    let is_variable = matches!(symbol.st_type(), elf::STT_OBJECT | elf::STT_COMMON);
                    let at = u64::from(symbol.st_name(endian));
                    if !is_variable || size == 0 || symbol.is_undefined(endian) || at >= len {
                        continue;
                    }
                    let Some(name) = name_at(file, start.saturating_add(at), len - at) else { continue };
                    let Some(rest) = room.checked_sub(name.len()).filter(|_| found.len() < MAX_SYMBOLS) else {
                        return Ok(found);
                    };
                    room = rest;
                    found.push((address, size, name));
                }
                // Cut off by the end of the file.
                if whole < bytes {
                    break;
                }
                offset = offset.saturating_add(bytes as u64);
                left -= symbols.len();
            }
        }
        Ok(found)
    }
}

/// The name at a place of a file, which ends within `most` bytes; read by itself, for a file may have far more names of
/// functions than of variables.
fn name_at(file: &File, offset: u64, most: u64) -> Option<String> {
    // One character more shows that there is more.
    let most = most.min(MAX_NAME as u64 + 4);
    let bytes = elf_file::read_at(file, offset, most, most).ok()?;
    let end = bytes.iter().position(|b| *b == 0);
    if end.is_none() && bytes.len() <= MAX_NAME {
        return None;
    }
    let text = match std::str::from_utf8(&bytes[..end.unwrap_or(bytes.len())]) {
        Ok(text) => text,
        // The last character goes on behind what was read.
        Err(e) if end.is_none() && e.error_len().is_none() => std::str::from_utf8(&bytes[..e.valid_up_to()]).ok()?,
        Err(_) => return None,
    };
    Some(clip_bytes(text, MAX_NAME).into_owned())
}

/// A path of at most [`MAX_NAME`] bytes: its end says most.
fn clip_path(path: String) -> String {
    const MARK: &str = "…";
    if path.len() <= MAX_NAME {
        return path;
    }
    format!("{MARK}{}", &path[path.ceil_char_boundary(path.len() - (MAX_NAME - MARK.len()))..])
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

    // Many symbols may share one long name, and a file may have millions of them.
    #[test]
    fn names_of_variables_are_bounded() {
        let file = File::open("/proc/self/exe").expect("ours");
        let read = |names| elf_file::with_class(&file, Symbols { names }).expect("read");
        let (all, few) = (read(MAX_NAMES), read(1000));
        let bytes = |symbols: &[(u64, u64, String)]| symbols.iter().map(|(.., name)| name.len()).sum::<usize>();
        assert!(bytes(&all) > 1000 && all.iter().all(|(.., name)| name.len() <= MAX_NAME));
        assert!((1..=1000).contains(&bytes(&few)) && all.starts_with(&few));

        let file = tempfile::tempfile().expect("a file");
        let text = format!("short\0{}\0no end", "é".repeat(4000));
        std::os::unix::fs::FileExt::write_all_at(&file, text.as_bytes(), 0).expect("written");
        assert_eq!(name_at(&file, 0, 5000).as_deref(), Some("short"));
        assert_eq!(name_at(&file, 0, 5), None);
        let long = name_at(&file, 6, 9000).expect("clipped");
        assert!(long.len() <= MAX_NAME && long.starts_with("éé") && long.ends_with('…'), "{long}");
        assert_eq!(name_at(&file, 6 + 8001, 9000), None);
        assert_eq!(name_at(&file, u64::MAX - 3, 9000), None);
    }

    // What a scan says goes into a recording, where it must fit.
    #[test]
    fn paths_keep_their_end() {
        assert_eq!(clip_path("/srv/app".to_owned()), "/srv/app");
        let clipped = clip_path(format!("/{}/app", "ü".repeat(3000)));
        assert!(clipped.len() <= MAX_NAME && clipped.starts_with("…ü") && clipped.ends_with("ü/app"), "{clipped}");
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
