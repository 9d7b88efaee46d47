//! The few system calls that the standard library has no safe name for. All `unsafe` of the readers is here.

use std::ffi::{CString, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

/// Gives memory that is free back to the kernel, as far as the C library can: with many sites, what one interval has used for
/// a moment is as much as all that is kept.
pub(crate) fn give_memory_back() {
    // SAFETY: glibc's malloc_trim may be called at any time; other threads may go on allocating.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::malloc_trim(0);
    }
}

/// `openat(2)` with `O_CLOEXEC`.
pub(crate) fn open_at(dir: &File, path: &Path, flags: i32) -> io::Result<File> {
    let path = c_path(path)?;
    // SAFETY: `path` is a C string that lives over the call; the descriptor is open as long as `dir` is borrowed.
    let fd = unsafe { libc::openat(dir.as_raw_fd(), path.as_ptr(), flags | libc::O_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us and nobody else owns it.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// Opens `path` with `root` as the root directory, for links in it as well; `O_CLOEXEC` is added.
///
/// Uses `openat2(2)` (Linux 5.6). Kernel links like `/proc/self` are not followed.
pub(crate) fn open_in_root(root: &File, path: &Path, flags: i32) -> io::Result<File> {
    let path = c_path(path)?;
    // SAFETY: `open_how` is plain data for which all-zero is valid.
    let mut how: libc::open_how = unsafe { std::mem::zeroed() };
    how.flags = u64::from((flags | libc::O_CLOEXEC).unsigned_abs());
    how.resolve = libc::RESOLVE_IN_ROOT | libc::RESOLVE_NO_MAGICLINKS;
    // SAFETY: `path` and `how` live over the call and `how`'s size is passed along.
    let fd = unsafe {
        libc::syscall(libc::SYS_openat2, root.as_raw_fd(), path.as_ptr(), &raw const how, size_of::<libc::open_how>())
    };
    match i32::try_from(fd) {
        // SAFETY: the kernel has just made this descriptor for us and nobody else owns it.
        Ok(fd) if fd >= 0 => Ok(unsafe { File::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

/// `readlinkat(2)`: where a link leads.
pub(crate) fn read_link_at(dir: &File, path: &Path) -> io::Result<PathBuf> {
    let path = c_path(path)?;
    let mut buffer = vec![0u8; libc::PATH_MAX as usize];
    // SAFETY: `buffer` is writable for the length that is passed; `path` is a C string that lives over the call.
    let n = unsafe { libc::readlinkat(dir.as_raw_fd(), path.as_ptr(), buffer.as_mut_ptr().cast(), buffer.len()) };
    let n = usize::try_from(n).map_err(|_| io::Error::last_os_error())?;
    buffer.truncate(n);
    Ok(PathBuf::from(OsString::from_vec(buffer)))
}

/// A new anonymous file in memory; gone with its last descriptor.
pub(crate) fn memory_file() -> io::Result<File> {
    // SAFETY: the name is a C string literal.
    let fd = unsafe { libc::memfd_create(c"memleak-symbols".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us and nobody else owns it.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// Kind of the file system that a file lies on (`f_type` of `statfs(2)`).
pub(crate) fn file_system(file: &File) -> io::Result<i64> {
    // SAFETY: `statfs` is plain data for which all-zero is valid.
    let mut stat: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: `stat` is writable over the call; the descriptor is open as long as `file` is borrowed.
    if unsafe { libc::fstatfs(file.as_raw_fd(), &raw mut stat) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(stat.f_type)
}

/// `sysconf(3)`; -1 when the system does not know.
pub(crate) fn sysconf(name: i32) -> i64 {
    // SAFETY: takes and returns plain numbers.
    unsafe { libc::sysconf(name) }
}

/// Gives up what a process that reads hostile files has no use for: root, new privileges, core files, and memory of its
/// own beyond `memory` bytes. It ends with its parent. What cannot be given up (not root) is kept.
pub(crate) fn confine(user: u32, memory: u64) {
    let limit = |resource, bytes| {
        let limit = libc::rlimit { rlim_cur: bytes, rlim_max: bytes };
        // SAFETY: `limit` lives over the call.
        unsafe { libc::setrlimit(resource, &raw const limit) }
    };
    limit(libc::RLIMIT_DATA, memory);
    limit(libc::RLIMIT_CORE, 0);
    // SAFETY: plain numbers; the list of groups is empty, so its pointer is not read.
    unsafe {
        if libc::geteuid() == 0 {
            libc::setgroups(0, std::ptr::null());
            libc::setresgid(user, user, user);
            libc::setresuid(user, user, user);
        }
        // After the change of user, which clears it.
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
    }
}

/// Reads memory of another process at `address` (`process_vm_readv(2)`); returns how many bytes could be read.
pub(crate) fn read_memory(pid: u32, address: u64, buffer: &mut [u8]) -> io::Result<usize> {
    let pid = libc::pid_t::try_from(pid).map_err(|_| io::Error::from_raw_os_error(libc::ESRCH))?;
    let local = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    let remote = libc::iovec { iov_base: address as *mut libc::c_void, iov_len: buffer.len() };
    // SAFETY: `local` describes `buffer`, which is writable over the call; the kernel checks the other side.
    let got = unsafe { libc::process_vm_readv(pid, &raw const local, 1, &raw const remote, 1, 0) };
    usize::try_from(got).map_err(|_| io::Error::last_os_error())
}
