//! What this kernel can do, each answer with its evidence.
//!
//! Every way to attach is tried on a function of our own, which is then called: kernels exist that load a program
//! and refuse to attach it, so neither versions nor successful loads prove anything.

use std::fmt;
use std::mem::MaybeUninit;
use std::path::Path;
use std::sync::OnceLock;

use libbpf_rs::btf::{self, Btf};
use libbpf_rs::skel::{OpenSkel, SkelBuilder};
use libbpf_rs::{Link, ProgramMut, UprobeMultiOpts, UprobeOpts};

use crate::skeleton::features::{FeaturesSkel, FeaturesSkelBuilder};
use crate::{Error, ErrorKind, Result, own_code};

/// A way to attach uprobes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Backend {
    /// One program sees entry and return; one link for all functions of a file (Linux 6.13+).
    Session,
    /// One link for all entries of a file and one for all returns (Linux 6.6+).
    Multi,
    /// One perf event per probe, told apart by attach cookies (Linux 5.15+).
    Perf,
    /// One perf event and one copy of the program per probe (no attach cookies; Linux 5.10+).
    PerfPlain,
}

impl Backend {
    /// All ways, best first.
    pub const ALL: [Backend; 4] = [Backend::Session, Backend::Multi, Backend::Perf, Backend::PerfPlain];

    /// Name used in settings and messages.
    pub fn as_str(self) -> &'static str {
        match self {
            Backend::Session => "session",
            Backend::Multi => "multi",
            Backend::Perf => "perf",
            Backend::PerfPlain => "perf-plain",
        }
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Which ways to attach work here.
#[derive(Clone, Debug)]
pub struct Features {
    results: Vec<(Backend, Result<(), String>)>,
}

impl Features {
    /// Tries every way. Takes some 100 ms.
    ///
    /// # Errors
    /// When no BPF program can run at all: a missing privilege (named), or a kernel without BTF.
    pub fn detect() -> Result<Features> {
        check_kernel()?;
        let mut results = Vec::new();
        for backend in Backend::ALL {
            results.push((backend, try_backend(backend).map_err(|e| e.to_string())));
        }
        Ok(Features { results })
    }

    /// Tries the ways in order and stops at the first that works, or tries only the wanted one.
    ///
    /// # Errors
    /// As [`Features::detect`]; also when the wanted way, or every way, fails: the message says why.
    pub fn choose(wanted: Option<Backend>) -> Result<Backend> {
        check_kernel()?;
        let mut reasons = Vec::new();
        for backend in Backend::ALL {
            if wanted.is_some_and(|w| w != backend) {
                continue;
            }
            match try_backend(backend) {
                Ok(()) => return Ok(backend),
                Err(e) => reasons.push(format!("{backend}: {e}")),
            }
        }
        let what = match wanted {
            Some(w) => format!("backend {w} does not work here; leave collector.backend = \"auto\""),
            None => "no way to attach uprobes works here".to_owned(),
        };
        Err(Error::new(ErrorKind::Kernel, format!("{what} ({})", reasons.join("; "))))
    }

    /// Every way with `Ok`, or why it does not work.
    pub fn results(&self) -> impl Iterator<Item = (Backend, Result<(), &str>)> {
        self.results.iter().map(|(b, r)| (*b, r.as_ref().copied().map_err(String::as_str)))
    }
}

/// Whether a BPF program can send a signal to another task than the current one (Linux 6.13+).
pub(crate) fn can_signal_others() -> bool {
    has_function("bpf_send_signal_task")
}

/// Whether a program can keep its CPU to itself, by holding off interrupts, and call global functions meanwhile (Linux
/// 6.15+). The verifier alone knows.
pub(crate) fn can_hold_cpu() -> bool {
    static ANSWER: OnceLock<bool> = OnceLock::new();
    *ANSWER.get_or_init(try_to_hold_cpu)
}

/// Whether a program can hold off preemption, and call global functions meanwhile: the kernels that allow it are those that
/// allow it with interrupts held off.
pub(crate) fn can_hold_preemption() -> bool {
    can_hold_cpu() && has_function("bpf_preempt_disable")
}

fn try_to_hold_cpu() -> bool {
    // Asked first, because libbpf warns of a program that does not load.
    if !has_function("bpf_local_irq_save") {
        return false;
    }
    let mut storage = MaybeUninit::uninit();
    let Ok(mut open) = FeaturesSkelBuilder::default().open(&mut storage) else { return false };
    for mut prog in open.open_object_mut().progs_mut() {
        let is_wanted = prog.name() == "feature_hold_cpu";
        prog.set_autoload(is_wanted);
    }
    open.load().is_ok()
}

/// Whether the kernel has a function that programs may call.
fn has_function(name: &str) -> bool {
    Btf::from_vmlinux().is_ok_and(|btf| btf.type_by_name::<btf::types::Func<'_>>(name).is_some())
}

/// What must be there whatever the backend.
pub(crate) fn check_kernel() -> Result<()> {
    check_capabilities()?;
    check_lockdown()?;
    if !Path::new("/sys/kernel/btf/vmlinux").exists() {
        return Err(Error::new(
            ErrorKind::Kernel,
            "this kernel has no type information (/sys/kernel/btf/vmlinux is missing): memleak needs a kernel built \
             with CONFIG_DEBUG_INFO_BTF=y, as those of Debian 11+, Ubuntu 20.10+, Fedora and RHEL 8.2+ are",
        ));
    }
    Ok(())
}

/// A kernel that keeps its memory from being read, whoever asks. Without securityfs it is not known whether this one does.
fn check_lockdown() -> Result<()> {
    let modes = std::fs::read_to_string("/sys/kernel/security/lockdown").unwrap_or_default();
    if !modes.contains("[confidentiality]") {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Permission,
        "this kernel is locked down: in the mode confidentiality no BPF program may read its memory, not even root's; boot \
         with lockdown=integrity or without lockdown=",
    ))
}

/// Capabilities by bit number, see capability.h: CAP_SYS_ADMIN alone, or CAP_BPF and CAP_PERFMON.
fn check_capabilities() -> Result<()> {
    const CAPABILITIES: [(&str, u32); 2] = [("CAP_BPF", 39), ("CAP_PERFMON", 38)];
    const SYS_ADMIN: u32 = 21;
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective =
        (status.lines()).find_map(|l| l.strip_prefix("CapEff:")).and_then(|v| u64::from_str_radix(v.trim(), 16).ok());
    // Without /proc nothing is known: let the kernel say what it refuses.
    let Some(effective) = effective else { return Ok(()) };
    let has = |bit: u32| effective & (1 << bit) != 0;
    let missing: Vec<&str> = CAPABILITIES.iter().filter(|(_, bit)| !has(*bit)).map(|(name, _)| *name).collect();
    if has(SYS_ADMIN) || missing.is_empty() {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Permission,
        format!(
            "missing {}: run memleak as root (sudo memleak ...), or give the binary what it needs: sudo setcap \
             cap_bpf,cap_perfmon,cap_sys_ptrace,cap_dac_read_search,cap_checkpoint_restore+ep $(command -v memleak)",
            missing.join(" and ")
        ),
    ))
}

/// Loads and attaches the backend's programs to [`own_code::allocate`], calls it and looks at the counts.
fn try_backend(backend: Backend) -> Result<()> {
    const CALLS: u64 = 3;
    const COOKIE: u64 = 7;
    let _alone = own_code::alone();
    let offset = own_code::offset(own_code::allocate_address())?;
    let pid = std::process::id().cast_signed();
    let exe = Path::new("/proc/self/exe");
    let mut storage = MaybeUninit::uninit();
    let mut open = FeaturesSkelBuilder::default()
        .open(&mut storage)
        .map_err(|e| Error::bpf(format!("open the feature test for {backend}"), &e))?;
    let progs = &mut open.progs;
    progs.feature_hold_cpu.set_autoload(false);
    progs.feature_session.set_autoload(backend == Backend::Session);
    progs.feature_multi_enter.set_autoload(backend == Backend::Multi);
    progs.feature_multi_return.set_autoload(backend == Backend::Multi);
    progs.feature_perf_cookie.set_autoload(backend == Backend::Perf);
    progs.feature_perf_enter.set_autoload(backend == Backend::PerfPlain);
    progs.feature_perf_return.set_autoload(matches!(backend, Backend::Perf | Backend::PerfPlain));
    let skel = open.load().map_err(|e| Error::bpf("load it", &e))?;

    let multi = |prog: &ProgramMut<'_>, retprobe: bool, session: bool| -> Result<Link> {
        let opts = UprobeMultiOpts {
            offsets: vec![offset],
            cookies: vec![COOKIE],
            retprobe,
            session,
            ..UprobeMultiOpts::default()
        };
        prog.attach_uprobe_multi_with_opts(pid, exe, "", opts).map_err(|e| Error::bpf("attach it", &e))
    };
    let perf = |prog: &ProgramMut<'_>, retprobe: bool, cookie: u64| -> Result<Link> {
        let opts = UprobeOpts { retprobe, cookie, ..UprobeOpts::default() };
        prog.attach_uprobe_with_opts(pid, exe, offset, opts).map_err(|e| Error::bpf("attach it", &e))
    };
    let progs = &skel.progs;
    let links = match backend {
        Backend::Session => vec![multi(&progs.feature_session, false, true)?],
        Backend::Multi => {
            vec![multi(&progs.feature_multi_enter, false, false)?, multi(&progs.feature_multi_return, true, false)?]
        }
        Backend::Perf => {
            vec![perf(&progs.feature_perf_cookie, false, COOKIE)?, perf(&progs.feature_perf_return, true, COOKIE)?]
        }
        Backend::PerfPlain => {
            vec![perf(&progs.feature_perf_enter, false, 0)?, perf(&progs.feature_perf_return, true, 0)?]
        }
    };
    for n in 0..CALLS {
        std::hint::black_box(own_code::allocate(n));
    }
    drop(links);
    let (entries, returns, cookie) = seen(&skel);
    let expected_cookie = if backend == Backend::PerfPlain { 0 } else { COOKIE };
    if (entries, returns, cookie) != (CALLS, CALLS, expected_cookie) {
        return Err(Error::new(
            ErrorKind::Kernel,
            format!(
                "it attaches, but of {CALLS} calls {entries} entries and {returns} returns were seen, cookie {cookie}"
            ),
        ));
    }
    Ok(())
}

/// Entries, returns and cookie that the feature test saw.
fn seen(skel: &FeaturesSkel<'_>) -> (u64, u64, u64) {
    skel.maps.bss_data.as_ref().map_or((0, 0, 0), |bss| (bss.entries, bss.returns, bss.cookie))
}
