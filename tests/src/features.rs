//! What a test needs from the machine, asked for by trying it.
//!
//! A test that cannot run says so on standard error and passes, because a developer without root still wants the
//! rest; under `CI` it fails instead, because there nobody reads the note and the machine is meant to have it all.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use crate::memleak::{memleak_command, output_within};
use crate::program::program_path;

/// Something that a test cannot do without.
#[derive(Clone, Copy, Debug)]
pub enum Feature {
    /// Root, the `bpf` system call and uprobes: what attaching to a process takes.
    Bpf,
    /// A way to attach uprobes that works on this kernel, by the name it has in settings.
    Backend(&'static str),
    /// A kernel that can stop the children of a watched process, so that they are followed from their first instruction.
    StoppedChildren,
    /// An installed command of that name.
    Command(&'static str),
    /// An installed shared library with that file name.
    Library(&'static str),
    /// A test program of that name, which needs a compiler that may be missing.
    Program(&'static str),
    /// A cgroup v2 hierarchy in which groups can be made.
    CgroupV2,
    /// A mount namespace of one's own.
    MountNamespace,
    /// User, pid and mount namespaces of one's own, as rootless containers have them.
    UserNamespace,
}

/// The first of `features` that is missing, as a sentence; `None` when all are there.
pub fn missing(features: &[Feature]) -> Option<String> {
    features.iter().find_map(|feature| match *feature {
        Feature::Bpf => {
            static REASON: OnceLock<Option<String>> = OnceLock::new();
            REASON.get_or_init(bpf_missing).clone()
        }
        Feature::Backend(name) => backend_missing(name),
        Feature::StoppedChildren => {
            let symbols = std::fs::read_to_string("/proc/kallsyms").unwrap_or_default();
            (!symbols.contains(" bpf_send_signal_task\n"))
                .then(|| "this kernel cannot stop new children (bpf_send_signal_task)".to_owned())
        }
        Feature::Command(name) => {
            (!is_installed(name)).then(|| format!("{name} is not installed (tests/setup.sh test installs it)"))
        }
        Feature::Library(name) => {
            library_path(name).is_none().then(|| format!("{name} is not installed (tests/setup.sh test installs it)"))
        }
        Feature::Program(name) => program_path(name)
            .is_none()
            .then(|| format!("{name} was not built: its compiler is not installed (tests/setup.sh test installs it)")),
        Feature::CgroupV2 => cgroup_missing(),
        Feature::UserNamespace => {
            let unshare = ["--user", "--map-root-user", "--mount", "--pid", "--fork", "true"];
            let works = Command::new("unshare").args(unshare).stderr(Stdio::null()).status();
            (!works.is_ok_and(|s| s.success())).then(|| "no user namespace can be made".to_owned())
        }
        Feature::MountNamespace => {
            let works = Command::new("unshare").args(["--mount", "true"]).stderr(Stdio::null()).status();
            (!works.is_ok_and(|s| s.success())).then(|| "no mount namespace can be made (root is needed)".to_owned())
        }
    })
}

/// Notes that the running test was skipped.
///
/// # Panics
/// When `CI` is set in the environment.
pub fn skip(reason: &str) {
    let thread = std::thread::current();
    let test = thread.name().unwrap_or("a test");
    assert!(std::env::var_os("CI").is_none(), "{test} cannot run, and CI may not skip it: {reason}");
    eprintln!("SKIP {test}: {reason}");
}

/// True when a command of that name can be started.
pub fn is_installed(name: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    // Debian keeps servers out of a user's PATH.
    std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]).any(|dir| dir.join(name).is_file())
}

/// Path of an installed shared library; `None` when there is none of that name.
pub fn library_path(name: &str) -> Option<PathBuf> {
    let mut folders = vec![PathBuf::from("/usr/lib"), PathBuf::from("/usr/lib64")];
    // Debian: one folder per architecture.
    folders.extend(std::fs::read_dir("/usr/lib").into_iter().flatten().filter_map(|e| e.ok().map(|e| e.path())));
    folders.into_iter().map(|folder| folder.join(name)).find(|path| path.is_file())
}

fn bpf_missing() -> Option<String> {
    // SAFETY: geteuid takes nothing and cannot fail.
    if unsafe { libc::geteuid() } != 0 {
        return Some("not root (run the tests with sudo)".to_owned());
    }
    if !Path::new("/sys/bus/event_source/devices/uprobe/type").exists() {
        return Some("the kernel has no uprobes (CONFIG_UPROBE_EVENTS)".to_owned());
    }
    /// The first fields of `union bpf_attr` for BPF_MAP_CREATE; the kernel takes the rest as zero.
    #[repr(C)]
    struct MapCreate {
        map_type: u32,
        key_size: u32,
        value_size: u32,
        max_entries: u32,
    }
    const BPF_MAP_CREATE: libc::c_int = 0;
    const BPF_MAP_TYPE_ARRAY: u32 = 2;
    let attr = MapCreate { map_type: BPF_MAP_TYPE_ARRAY, key_size: 4, value_size: 4, max_entries: 1 };
    // SAFETY: the kernel reads exactly the given number of bytes from `attr`, which outlives the call.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, BPF_MAP_CREATE, &raw const attr, size_of::<MapCreate>()) };
    if fd < 0 {
        return Some(format!("bpf() is refused: {}", std::io::Error::last_os_error()));
    }
    // SAFETY: the descriptor was just made and belongs to nobody else.
    unsafe { libc::close(fd as libc::c_int) };
    None
}

/// Asks memleak itself, whose doctor attaches in every way.
fn backend_missing(name: &str) -> Option<String> {
    static DOCTOR: OnceLock<String> = OnceLock::new();
    let doctor = DOCTOR.get_or_init(|| output_within(memleak_command().arg("doctor")).1);
    let line = doctor.lines().find_map(|line| line.trim().strip_prefix("uprobes by ")?.strip_prefix(name));
    let Some(line) = line.filter(|line| line.starts_with(' ')) else {
        return Some(format!("memleak doctor does not say whether uprobes by {name} work:\n{doctor}"));
    };
    let reason = line.trim().strip_prefix("no: ")?;
    Some(format!("no uprobes by {name}: {reason}"))
}

fn cgroup_missing() -> Option<String> {
    let Some(root) = cgroup_root() else { return Some("no cgroup v2 hierarchy is mounted".to_owned()) };
    let probe = root.join(format!("memleak-feature-{}", std::process::id()));
    match std::fs::create_dir(&probe) {
        Ok(()) => {
            let _ = std::fs::remove_dir(&probe);
            None
        }
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => None,
        Err(error) => Some(format!("no cgroup can be made below {}: {error}", root.display())),
    }
}

/// Where the cgroup v2 hierarchy is mounted: `/sys/fs/cgroup`, or below it beside the older ones.
pub fn cgroup_root() -> Option<PathBuf> {
    let mounts = std::fs::read_to_string("/proc/self/mounts").ok()?;
    let fields = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    fields.into_iter().find(|f| f.get(2) == Some(&"cgroup2")).map(|f| PathBuf::from(f[1]))
}
