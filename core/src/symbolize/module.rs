//! One file that processes have mapped: kept open, looked into when a frame in it is asked for the first time.

use std::collections::HashMap;
use std::fs::File;
use std::rc::Rc;

use super::lookup::Answer;
use super::sources::{Layer, Surroundings, open_layers};
use super::worker::Reader;
use crate::error::Result;
use crate::maps::elf::ElfInfo;

/// Most addresses of one module whose answer is kept.
const MAX_ANSWERS: usize = 65_536;
/// A mapped file.
#[derive(Debug)]
pub(super) struct Module {
    /// The file; `None` when too many were open already.
    file: Option<File>,
    info: ElfInfo,
    /// Opened for lookup; `None` before the first and after [`Module::unload`].
    layers: Option<std::result::Result<Vec<Layer>, String>>,
    answers: HashMap<u64, Rc<Answer>>,
    /// A server was asked for its debug information and has not answered yet.
    waits: bool,
    /// When it was last asked, for [`Module::unload`]; counted by the caller.
    pub(super) used: u64,
}

impl Module {
    /// A module from an open file. `keep` holds the file open, so that it can be read after it was deleted.
    ///
    /// # Errors
    /// When it is no ELF file.
    pub(super) fn new(file: File, keep: bool) -> Result<Self> {
        let info = ElfInfo::read(&file)?;
        Ok(Module { file: keep.then_some(file), info, layers: None, answers: HashMap::new(), waits: false, used: 0 })
    }

    /// Its build id, hexadecimal.
    pub(super) fn build_id(&self) -> Option<&str> {
        self.info.build_id.as_deref()
    }

    /// Address, in the file's own terms, of a return address given by its offset in the file.
    pub(super) fn address_of(&self, return_offset: u64) -> Option<u64> {
        // The call may be the last instruction of what is loaded.
        self.info.address_of(return_offset.checked_sub(1)?)?.checked_add(1)
    }

    /// True when the file is held open.
    pub(super) fn is_kept(&self) -> bool {
        self.file.is_some()
    }

    /// Memory that copies of its file take, in bytes.
    pub(super) fn loaded_bytes(&self) -> u64 {
        self.layers.iter().flatten().flatten().map(|l| l.bytes).sum()
    }

    /// Gives the memory of copies back; answers are kept, and the next new question makes the copies again.
    pub(super) fn unload(&mut self) {
        self.layers = None;
    }

    /// The functions at a return address, given by its offset in the file. `reopen` is called when the file is needed
    /// and not held open.
    pub(super) fn answer(
        &mut self,
        return_offset: u64,
        around: &Surroundings<'_>,
        reader: &mut Reader,
        reopen: impl FnOnce() -> Option<File>,
    ) -> Rc<Answer> {
        if self.waits && !around.is_fetching(self.info.build_id.as_deref()) {
            // What was answered so far stays as it was shown; from now on there may be more to say.
            self.waits = false;
            self.layers = None;
            self.answers.clear();
        }
        if let Some(answer) = self.answers.get(&return_offset) {
            return answer.clone();
        }
        let answer = Rc::new(self.look_up(return_offset, around, reader, reopen));
        if self.answers.len() >= MAX_ANSWERS {
            self.answers.clear();
        }
        self.answers.insert(return_offset, answer.clone());
        answer
    }

    fn look_up(
        &mut self,
        return_offset: u64,
        around: &Surroundings<'_>,
        reader: &mut Reader,
        reopen: impl FnOnce() -> Option<File>,
    ) -> Answer {
        // The return address is behind the call; the call itself may be the last of its line, block or function.
        let call = return_offset.checked_sub(1).and_then(|o| self.info.address_of(o));
        let call = call.ok_or_else(|| "the address is outside of what the file loads".to_owned())?;
        let layers = self.open(around, reopen)?;
        let mut first_reason = None;
        for layer in layers.iter_mut() {
            match layer.look_up(call, around, reader) {
                Ok(functions) => return Ok(functions),
                Err(reason) => first_reason = first_reason.or(Some(reason)),
            }
        }
        Err(first_reason.unwrap_or_else(|| "the file has no symbols".to_owned()))
    }
}

impl Module {
    /// Where its names come from, in words. Opens it, and gives the memory back.
    pub(super) fn source(&mut self, around: &Surroundings<'_>, reopen: impl FnOnce() -> Option<File>) -> String {
        let source = match self.open(around, reopen) {
            Ok(layers) => layers.first().map_or_else(String::new, |layer| layer.origin.to_string()),
            Err(reason) => format!("nowhere: {reason}"),
        };
        self.unload();
        if self.waits { format!("{source}; a debuginfod server has been asked") } else { source }
    }

    fn open(
        &mut self,
        around: &Surroundings<'_>,
        reopen: impl FnOnce() -> Option<File>,
    ) -> std::result::Result<&mut Vec<Layer>, String> {
        if self.layers.is_none() {
            let layers = match self.file.as_ref() {
                Some(file) => open_layers(file, &self.info, around),
                None => match reopen() {
                    Some(file) => open_layers(&file, &self.info, around),
                    None => Err("the file is out of reach".to_owned()),
                },
            };
            self.waits = around.is_fetching(self.info.build_id.as_deref());
            self.layers = Some(layers);
        }
        match self.layers.as_mut() {
            Some(Ok(layers)) => Ok(layers),
            Some(Err(reason)) => Err(reason.clone()),
            None => Err("the file is out of reach".to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;
    use std::process::Command;
    use std::time::{Duration, Instant};

    use super::*;
    use crate::symbolize::lookup::Function;
    use crate::sys;

    const SOURCE: &str = "\
#include <stddef.h>
namespace pool {
template <typename T> struct Cache {
  [[gnu::noinline]] void put(T value, const char *name) { last = name; sum += value; asm volatile(\"\" ::: \"memory\"); }
  const char *last = nullptr;
  T sum = 0;
};
}
pool::Cache<long> cache;
extern \"C\" void entry(void) { cache.put(1, \"x\"); asm volatile(\"\" ::: \"memory\"); }
";

    /// Compiles a C++ library with `flags` and reads it.
    fn library(flags: &[&str]) -> Vec<u8> {
        let dir = tempfile::tempdir().expect("temporary folder");
        let (source, path) = (dir.path().join("cache.cc"), dir.path().join("cache.so"));
        std::fs::write(&source, SOURCE).expect("write");
        let mut gcc = Command::new("g++");
        gcc.args(["-O2", "-shared", "-fPIC", "-o"]).arg(&path).arg(&source).args(flags);
        let output = gcc.output().expect("g++ starts");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        std::fs::read(&path).expect("read")
    }

    fn file(data: &[u8]) -> File {
        let file = sys::memory_file().expect("memory");
        file.write_all_at(data, 0).expect("memory");
        file
    }

    const AROUND: Surroundings<'static> =
        Surroundings { path: None, root: None, debug_dirs: &[], max_bytes: 64 << 20, debuginfod: None };

    /// All functions that the executable part of a file has names for.
    fn all(module: &mut Module, around: &Surroundings<'_>) -> Vec<Function> {
        let (mut found, mut reader) = (Vec::new(), Reader::new(None));
        for offset in (0x1000..0x1400).step_by(4) {
            if let Ok(functions) = &*module.answer(offset, around, &mut reader, || None) {
                found.extend(functions.iter().cloned());
            }
        }
        found
    }

    fn put(functions: &[Function]) -> Option<&Function> {
        functions.iter().find(|f| f.name.contains("put"))
    }

    /// Production builds compress their debug information, in two ways; both must give the same names and lines.
    #[test]
    fn compressed_debug_information_is_read() {
        for flags in [&["-g"][..], &["-g", "-gz=zlib"], &["-g", "-gz=zstd"], &["-gdwarf-4"], &["-g", "-gsplit-dwarf"]] {
            if flags.contains(&"-gz=zstd")
                && Command::new("g++")
                    .args(["-gz=zstd", "-fsyntax-only", "-x", "c", "/dev/null"])
                    .output()
                    .is_ok_and(|o| !o.status.success())
            {
                eprintln!("skipped in part: this compiler has no zstd");
                continue;
            }
            let mut module = Module::new(file(&library(flags)), true).expect("sound");
            let found = all(&mut module, &AROUND);
            let function = put(&found).expect("named");
            assert_eq!(function.name, "pool::Cache<long>::put(long, char const*)", "{flags:?}");
            if !flags.contains(&"-gsplit-dwarf") {
                assert!(function.file.as_deref().is_some_and(|f| f.ends_with("cache.cc")), "{flags:?} {function:?}");
                assert_eq!(function.line, Some(4), "{flags:?}");
            }
        }
    }

    /// Without debug information C++ names come from the symbol table, just as readable.
    #[test]
    fn the_symbol_table_gives_readable_names() {
        let mut module = Module::new(file(&library(&[])), true).expect("sound");
        let found = all(&mut module, &AROUND);
        assert_eq!(put(&found).map(|f| f.name.as_str()), Some("pool::Cache<long>::put(long, char const*)"));
        assert!(found.iter().all(|f| f.line.is_none() && !f.inlined && f.offset > 0));
    }

    /// Programs of 32 bits run on 64-bit kernels; their files have other headers and tables.
    #[test]
    fn a_32_bit_file_is_read() {
        let dir = tempfile::tempdir().expect("temporary folder");
        let (wide, narrow) = (dir.path().join("wide.so"), dir.path().join("narrow.so"));
        std::fs::write(&wide, library(&["-g"])).expect("write");
        // The same code in the other class of file.
        let mut objcopy = Command::new("objcopy");
        objcopy.args(["-O", "elf32-x86-64"]).args([&wide, &narrow]);
        assert!(objcopy.status().expect("objcopy starts").success());
        let mut module = Module::new(File::open(&narrow).expect("open"), true).expect("sound");
        assert_eq!(std::fs::read(&narrow).expect("read")[4], 1, "class");
        // Conversion moves the code in the file; addresses stay.
        module.info.loads = vec![crate::maps::elf::Load { offset: 0, len: 1 << 20, address: 0 }];
        let found = all(&mut module, &AROUND);
        assert_eq!(put(&found).map(|f| f.name.as_str()), Some("pool::Cache<long>::put(long, char const*)"));
    }

    /// Offset of a section header in a file, by the section's name.
    fn section_header(data: &[u8], name: &[u8]) -> usize {
        let word = |at: usize| u64::from_le_bytes(data[at..at + 8].try_into().expect("8 bytes")) as usize;
        let half = |at: usize| u16::from_le_bytes(data[at..at + 2].try_into().expect("2 bytes")) as usize;
        let (table, count, names) = (word(40), half(60), half(62));
        let names = word(table + 64 * names + 24);
        (0..count)
            .map(|i| table + 64 * i)
            .find(|at| {
                let name_at = names + u32::from_le_bytes(data[*at..*at + 4].try_into().expect("4 bytes")) as usize;
                data[name_at..].starts_with(name) && data[name_at + name.len()] == 0
            })
            .expect("has the section")
    }

    /// Sections may claim any size, unpacked or not: that must cost a line of text, not the machine's memory.
    #[test]
    fn claims_of_enormous_sections_cost_only_lines() {
        let packed = library(&["-g", "-gz=zlib"]);
        let plain = library(&["-g"]);
        let header_of = |data: &[u8]| section_header(data, b".debug_info");
        let at = header_of(&packed) + 24;
        let contents = u64::from_le_bytes(packed[at..at + 8].try_into().expect("8 bytes")) as usize;
        let cases = [
            // The size after unpacking: two that cannot be, one that is smaller than the truth.
            (&packed, contents + 8, u64::MAX / 2),
            (&packed, contents + 8, 1 << 50),
            (&packed, contents + 8, 100),
            // The size in the file.
            (&plain, header_of(&plain) + 32, u64::MAX),
            (&plain, header_of(&plain) + 32, 1 << 25),
        ];
        for (sound, at, claim) in cases {
            let mut data = sound.clone();
            data[at..at + 8].copy_from_slice(&claim.to_le_bytes());
            let started = Instant::now();
            let mut module = Module::new(file(&data), true).expect("headers are sound");
            let found = all(&mut module, &AROUND);
            let function = put(&found).expect("named");
            assert_eq!((function.line, &*function.name), (None, "pool::Cache<long>::put(long, char const*)"));
            assert!(started.elapsed() < Duration::from_secs(10));
        }
        // A symbol table as large is no table.
        let mut data = plain.clone();
        let header = section_header(&plain, b".symtab");
        data[header + 32..header + 40].copy_from_slice(&(1u64 << 50).to_le_bytes());
        let mut module = Module::new(file(&data), true).expect("headers are sound");
        let answer = module.answer(0x1100, &AROUND, &mut Reader::new(None), || None);
        assert_eq!(
            *answer,
            Err(format!("failed to read an ELF file: its symbols are larger than {} bytes", AROUND.max_bytes))
        );
    }

    /// A file of many gigabytes costs what its symbols cost.
    #[test]
    fn a_huge_file_is_read_in_parts() {
        let data = library(&["-g"]);
        let huge = file(&data);
        huge.set_len(1 << 33).expect("sparse");
        let started = Instant::now();
        let mut module = Module::new(huge, true).expect("sound");
        assert!(put(&all(&mut module, &AROUND)).is_some());
        assert!(module.loaded_bytes() < 1 << 20, "{}", module.loaded_bytes());
        assert!(started.elapsed() < Duration::from_secs(10));
    }

    /// Whatever bytes a file has, there is an answer, in time.
    #[test]
    fn a_corrupt_file_gives_an_answer() {
        let sound = library(&["-g"]);
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut random = move |below: usize| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state % below as u64) as usize
        };
        let (mut named, mut nameless) = (0, 0);
        let started = Instant::now();
        for round in 0..600 {
            let mut data = sound.clone();
            match round % 4 {
                // Anywhere.
                0 => (0..1 + random(64)).for_each(|_| data[random(sound.len())] = random(256) as u8),
                // The symbol and debug sections.
                1 => {
                    let name =
                        [&b".debug_info"[..], b".debug_abbrev", b".debug_line", b".symtab", b".strtab"][random(5)];
                    let header = section_header(&sound, name);
                    let word = |at: usize| u64::from_le_bytes(sound[at..at + 8].try_into().expect("8 bytes")) as usize;
                    let (offset, len) = (word(header + 24), word(header + 32));
                    (0..1 + random(16)).for_each(|_| data[offset + random(len)] = random(256) as u8);
                }
                // The headers.
                2 => {
                    let table = section_header(&sound, b"");
                    let at = if random(2) == 0 { 16 + random(48) } else { table + random(sound.len() - table) };
                    data[at] = random(256) as u8;
                }
                _ => data.truncate(random(sound.len())),
            }
            let Ok(mut module) = Module::new(file(&data), true) else {
                nameless += 1;
                continue;
            };
            match put(&all(&mut module, &AROUND)) {
                Some(_) => named += 1,
                None => nameless += 1,
            }
        }
        // Both must happen, or the damage is not what it is meant to be.
        assert!(named > 50 && nameless > 50, "{named} {nameless}");
        assert!(started.elapsed() < Duration::from_secs(120), "{:?}", started.elapsed());
    }
}
