//! Files that are either the old one or the new one, never half of it.
//!
//! A report is rewritten while somebody may be reading it, and the disk may be full. So the text goes into a new file
//! in the same folder, reaches the disk, and only then takes the name. Used for every output that replaces a file.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use super::text::visible;
use crate::error::{Error, ErrorKind, Result};

/// Readable by its owner alone: reports name code, paths and command lines of other users' processes.
const MODE: u32 = 0o600;

/// Replaces `path` by a file with these contents and mode 0600.
///
/// If `path` is a symbolic link, the link is replaced and what it points to stays untouched, so that a link planted in
/// a shared folder cannot redirect the output. On failure an existing file keeps its contents, and nothing else is
/// left behind.
///
/// # Errors
/// The folder is missing or not writable, the disk is full, or `path` is a folder or a device.
pub fn write(path: &Path, contents: &[u8]) -> Result<()> {
    let shown = visible(&path.to_string_lossy()).into_owned();
    let fail = |e: io::Error| explain(&shown, path, e);
    // A device such as /dev/full is not a file that can be replaced, and replacing it would break the system.
    match fs::symlink_metadata(path) {
        Ok(meta) if !meta.is_file() && !meta.is_symlink() => {
            let what = if meta.is_dir() { "it is a folder" } else { "it is not a regular file" };
            return Err(Error::with_source(ErrorKind::Io, format!("failed to write {shown}"), what));
        }
        Ok(_) => {}
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(fail(e)),
    }
    let (temporary, mut file) = create_beside(path).map_err(fail)?;
    let written = file.write_all(contents).and_then(|()| file.sync_all());
    drop(file);
    if let Err(e) = written.and_then(|()| fs::rename(&temporary, path)) {
        // Nothing better can be done if this fails too; the first error is the one to tell.
        let _ = fs::remove_file(&temporary);
        return Err(fail(e));
    }
    // The new name itself reaches the disk with its folder. The file is complete either way, so a file system that
    // cannot do this is no reason to fail.
    if let Ok(folder) = File::open(folder_of(path)) {
        let _ = folder.sync_all();
    }
    Ok(())
}

/// The folder that holds `path`.
fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// A new, empty file beside `path` that nobody else can have open.
fn create_beside(path: &Path) -> io::Result<(PathBuf, File)> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let name = path.file_name().ok_or_else(|| io::Error::other("it names no file"))?;
    loop {
        let mut temporary = OsString::from(".");
        temporary.push(name);
        temporary.push(format!(".{}-{}.tmp", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed)));
        let temporary = folder_of(path).join(temporary);
        // `create_new` follows no link and opens no file of somebody else; a leftover of an earlier process with the
        // same id only costs another name.
        match OpenOptions::new().write(true).create_new(true).mode(MODE).open(&temporary) {
            Ok(file) => return Ok((temporary, file)),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(e),
        }
    }
}

/// The error with what to do about it.
fn explain(shown: &str, path: &Path, error: io::Error) -> Error {
    let folder = visible(&folder_of(path).to_string_lossy()).into_owned();
    let hint = match error.kind() {
        io::ErrorKind::NotFound => format!("; the folder {folder} does not exist"),
        io::ErrorKind::PermissionDenied => format!("; the folder {folder} is not writable for this user"),
        io::ErrorKind::ReadOnlyFilesystem => format!("; {folder} is on a read-only file system"),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "; the disk is full and an older file was kept".to_owned()
        }
        _ => String::new(),
    };
    Error::io(format!("failed to write {shown}{hint}"), error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).expect("folder");
        entries.map(|e| e.expect("entry").file_name().to_string_lossy().into_owned()).collect()
    }

    /// Others must not read a report, whatever the umask or the old file's mode; no temporary file may stay.
    #[test]
    fn the_file_is_replaced_whole_with_mode_0600() {
        let dir = tempfile::tempdir().expect("folder");
        let path = dir.path().join("report.html");
        fs::write(&path, "old and longer").expect("old file");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).expect("mode");
        write(&path, b"new").expect("written");
        assert_eq!(fs::read(&path).expect("file"), b"new");
        assert_eq!(fs::metadata(&path).expect("file").mode() & 0o777, 0o600);
        assert_eq!(names(dir.path()), ["report.html"]);
    }

    /// A link planted at the path must not make us overwrite the file it points to.
    #[test]
    fn a_symbolic_link_is_replaced_and_its_target_untouched() {
        let dir = tempfile::tempdir().expect("folder");
        let (victim, path) = (dir.path().join("victim"), dir.path().join("report.html"));
        fs::write(&victim, "precious").expect("victim");
        symlink(&victim, &path).expect("link");
        write(&path, b"new").expect("written");
        assert_eq!(fs::read(&victim).expect("victim"), b"precious");
        assert!(fs::symlink_metadata(&path).expect("file").is_file());
        assert_eq!(fs::read(&path).expect("file"), b"new");
    }

    /// The message must name the folder that is missing, or nobody finds the typing error.
    #[test]
    fn a_missing_folder_is_named() {
        let dir = tempfile::tempdir().expect("folder");
        let message = format!("{:#}", write(&dir.path().join("no/report.html"), b"x").expect_err("no folder"));
        assert!(message.contains("/no does not exist"), "{message}");
    }

    /// A folder or device at the path is refused, never replaced.
    #[test]
    fn folders_and_devices_are_refused() {
        let dir = tempfile::tempdir().expect("folder");
        let message = format!("{:#}", write(dir.path(), b"x").expect_err("a folder"));
        assert!(message.ends_with("it is a folder"), "{message}");
        let message = format!("{:#}", write(Path::new("/dev/full"), b"x").expect_err("a device"));
        assert_eq!(message, "failed to write /dev/full: it is not a regular file");
    }

    /// Without permission the old file must stay as it is. Root passes every permission check, so it steps down.
    #[test]
    fn an_unwritable_folder_keeps_the_old_file() {
        let dir = tempfile::tempdir().expect("folder");
        let path = dir.path().join("report.html");
        fs::write(&path, "old").expect("old file");
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o555)).expect("mode");
        let result = as_nobody(|| write(&path, b"new"));
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).expect("mode");
        let message = format!("{:#}", result.expect_err("not writable"));
        assert!(message.contains("is not writable for this user"), "{message}");
        assert_eq!(fs::read(&path).expect("file"), b"old");
        assert_eq!(names(dir.path()), ["report.html"]);
    }

    /// A full disk must cost the new report, not the old one, and leave no temporary file that keeps it full.
    #[test]
    fn a_full_disk_keeps_the_old_file() {
        let dir = tempfile::tempdir().expect("folder");
        let Some(_mount) = SmallDisk::mount(dir.path()) else {
            eprintln!("skipped: mounting a tmpfs is not permitted here");
            return;
        };
        let path = dir.path().join("report.html");
        write(&path, b"old").expect("fits");
        let message = format!("{:#}", write(&path, &vec![b'x'; 1 << 20]).expect_err("does not fit"));
        assert!(message.contains("the disk is full and an older file was kept"), "{message}");
        assert_eq!(fs::read(&path).expect("file"), b"old");
        assert_eq!(names(dir.path()), ["report.html"]);
    }

    /// Runs `f` on a thread whose file access is that of user 65534.
    fn as_nobody<T: Send>(f: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                // SAFETY: the raw system call changes the file system user of this thread alone, which ends with `f`.
                unsafe { libc::syscall(libc::SYS_setfsuid, 65534_u32) };
                f()
            });
            thread.join().expect("thread")
        })
    }

    /// A file system of 64 KiB, unmounted when dropped.
    struct SmallDisk(std::ffi::CString);

    impl SmallDisk {
        fn mount(path: &Path) -> Option<SmallDisk> {
            let path = std::ffi::CString::new(path.to_str()?).ok()?;
            // SAFETY: all pointers are to NUL-terminated strings that outlive the call.
            let result = unsafe {
                libc::mount(c"tmpfs".as_ptr(), path.as_ptr(), c"tmpfs".as_ptr(), 0, c"size=64k".as_ptr().cast())
            };
            (result == 0).then_some(SmallDisk(path))
        }
    }

    impl Drop for SmallDisk {
        fn drop(&mut self) {
            // SAFETY: the pointer is to a NUL-terminated string that outlives the call.
            unsafe { libc::umount2(self.0.as_ptr(), libc::MNT_DETACH) };
        }
    }
}
