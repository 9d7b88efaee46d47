//! Opens the file behind a mapping: the very file, also when it was deleted, replaced or lies in another mount
//! namespace. Nothing but regular files is ever opened for reading, because opening a device or a pipe has effects
//! and can block.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use super::{Backing, Mapping};
use crate::error::{Error, ErrorKind, Result};
use crate::process::ProcDir;
use crate::sys;

/// `f_type` of overlayfs (include/uapi/linux/magic.h).
const OVERLAYFS: i64 = 0x794c_7630;
/// `f_type` of btrfs.
const BTRFS: i64 = 0x9123_683e;

/// Which file it is, and which version of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FileId {
    /// Device.
    pub dev: u64,
    /// Inode.
    pub inode: u64,
    /// Length in bytes.
    pub len: u64,
    /// Time of the last change of its contents: seconds and nanoseconds since 1970.
    pub mtime: (i64, i64),
}

impl FileId {
    /// The identity of an open file.
    ///
    /// # Errors
    /// Those of `fstat(2)`.
    pub fn of(file: &File) -> io::Result<Self> {
        let meta = file.metadata()?;
        Ok(FileId { dev: meta.dev(), inode: meta.ino(), len: meta.len(), mtime: (meta.mtime(), meta.mtime_nsec()) })
    }
}

/// Opens the file behind a mapping for reading.
///
/// Tried in this order: the kernel's own link to the mapped file (`/proc/PID/map_files`, exact, needs
/// CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN), the path below the process's root, the path below ours; the last two
/// only count when device and inode agree with the mapping. Use `/proc/self/fd/N` where a path is needed.
///
/// # Errors
/// Kind [`ErrorKind::Target`] when the process has ended or the file is out of reach, [`ErrorKind::Permission`] when we
/// may not read it, [`ErrorKind::Io`] for anything that is no regular file.
pub fn open_mapped(dir: &ProcDir, mapping: &Mapping) -> Result<File> {
    let Backing::File { path, .. } = &mapping.backing else {
        return Err(Error::new(ErrorKind::Io, "failed to open a mapped file: the memory has no file behind it"));
    };
    let shown = || path.to_string_lossy();
    let link = format!("map_files/{:x}-{:x}", mapping.start, mapping.end);
    let by_link = dir.open_at(&link, libc::O_PATH);
    let found = match by_link {
        Ok(file) => Ok(file),
        Err(by_link) => by_path(dir, mapping, path).map_err(|by_path| {
            // The link's error says more, unless it is only that this needs more privilege than the path does.
            if by_link.raw_os_error() == Some(libc::EPERM) { by_path } else { by_link }
        }),
    };
    found.and_then(|file| reopen_regular(&file)).map_err(|e| {
        let kind = match e.kind() {
            io::ErrorKind::NotFound => ErrorKind::Target,
            _ if e.raw_os_error() == Some(libc::ESRCH) => ErrorKind::Target,
            io::ErrorKind::PermissionDenied => ErrorKind::Permission,
            _ => ErrorKind::Io,
        };
        Error::with_source(kind, format!("failed to open {} of process {}", shown(), dir.pid()), e)
    })
}

/// Opens the path and checks that it still leads to the mapped file.
fn by_path(dir: &ProcDir, mapping: &Mapping, path: &Path) -> io::Result<File> {
    let in_root = dir.open_in_root(path, libc::O_PATH).and_then(|f| same_file(f, mapping));
    // A process in a chroot: the kernel shows us the path from our root.
    in_root.or_else(|e| {
        let ours = std::fs::OpenOptions::new().read(true).custom_flags(libc::O_PATH | libc::O_CLOEXEC).open(path);
        ours.and_then(|f| same_file(f, mapping)).map_err(|_| e)
    })
}

fn same_file(file: File, mapping: &Mapping) -> io::Result<File> {
    let meta = file.metadata()?;
    let dev = (libc::major(meta.dev()), libc::minor(meta.dev()));
    // These two show another device number in stat(2) than in the memory map.
    let device_differs = || matches!(sys::file_system(&file), Ok(OVERLAYFS | BTRFS));
    if meta.ino() == mapping.inode && (dev == mapping.dev || device_differs()) {
        return Ok(file);
    }
    Err(io::Error::new(io::ErrorKind::NotFound, "the path leads to another file now"))
}

/// Opens for reading what `file` (`O_PATH`) refers to, when it is a regular file.
pub(crate) fn reopen_regular(file: &File) -> io::Result<File> {
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    std::fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC | libc::O_NOCTTY)
        .open(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

#[cfg(test)]
mod tests {
    use std::ffi::CString;
    use std::os::unix::ffi::OsStrExt;

    use super::*;

    fn mapping_of(path: &Path) -> Mapping {
        let meta = std::fs::metadata(path).expect("exists");
        Mapping {
            start: 0x1000,
            end: 0x2000,
            perms: super::super::Perms::default(),
            offset: 0,
            dev: (libc::major(meta.dev()), libc::minor(meta.dev())),
            inode: meta.ino(),
            backing: Backing::File { path: path.into(), deleted: false },
        }
    }

    /// A replaced library has the old path and other contents: names from it would be wrong, so it must not open.
    #[test]
    fn a_file_that_took_the_path_over_is_not_opened() {
        let dir = tempfile::tempdir().expect("temporary folder");
        let own = ProcDir::open(std::process::id()).expect("we run");
        let path = dir.path().join("lib.so");
        std::fs::write(&path, "old").expect("write");
        let mapping = mapping_of(&path);
        assert!(open_mapped(&own, &mapping).is_ok());
        std::fs::rename(&path, dir.path().join("kept")).expect("rename");
        std::fs::write(&path, "new").expect("write");
        assert_eq!(open_mapped(&own, &mapping).expect_err("another file").kind(), ErrorKind::Target);
    }

    /// Opening a pipe without a writer would block the collector for ever.
    #[test]
    fn a_pipe_is_refused_at_once() {
        let dir = tempfile::tempdir().expect("temporary folder");
        let path = dir.path().join("pipe");
        let c_path = CString::new(path.as_os_str().as_bytes()).expect("no NUL");
        // SAFETY: `c_path` is a C string that lives over the call.
        assert_eq!(unsafe { libc::mkfifo(c_path.as_ptr(), 0o600) }, 0);
        let own = ProcDir::open(std::process::id()).expect("we run");
        let error = open_mapped(&own, &mapping_of(&path)).expect_err("pipe");
        assert_eq!(error.kind(), ErrorKind::Io);
        assert!(format!("{error:#}").contains("not a regular file"), "{error:#}");
    }
}
