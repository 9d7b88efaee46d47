//! The piece of code that the kernel maps into every process (`[vdso]`). It is the same in all 64-bit processes, so
//! ours serves for theirs, also after they have ended.

use std::cell::RefCell;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::rc::Rc;

use super::module::Module;
use crate::error::{Error, ErrorKind, Result};
use crate::maps::{Backing, Mapping, Maps};
use crate::process::ProcDir;
use crate::sys;

/// Larger than any; today's have two pages.
const MAX_BYTES: u64 = 1 << 20;

/// Reads our own.
///
/// # Errors
/// When this process has none, or its memory cannot be read.
pub(super) fn module() -> Result<Rc<RefCell<Module>>> {
    Module::new(image()?, true).map(RefCell::new).map(Rc::new)
}

/// Our own as a file.
///
/// # Errors
/// As [`module`].
pub(crate) fn image() -> Result<File> {
    let dir = ProcDir::open(std::process::id())?;
    let maps = Maps::read(&dir)?;
    let is_vdso = |m: &&Mapping| matches!(&m.backing, Backing::Special(name) if **name == *"[vdso]");
    let mapping = maps.iter().find(is_vdso).filter(|m| m.end - m.start <= MAX_BYTES);
    let mapping = mapping.ok_or_else(|| Error::new(ErrorKind::Kernel, "failed to find the vdso of this process"))?;
    let failed = |e| Error::io("failed to copy the vdso of this process", e);
    let mut data = vec![0; (mapping.end - mapping.start) as usize];
    let memory = dir.open_at("mem", libc::O_RDONLY).map_err(failed)?;
    memory.read_exact_at(&mut data, mapping.start).map_err(failed)?;
    let file = sys::memory_file().map_err(failed)?;
    file.write_all_at(&data, 0).map_err(failed)?;
    Ok(file)
}
