use std::process::{Child, Command};

use super::helper::{LOOK, State, Thread, decimal, has_ended, looks, wait_for};
use super::*;
use crate::maps::Maps;
use crate::process::ProcDir;
use crate::reachability::memory::Ranges;

/// A process that sleeps, past its start.
fn sleeper() -> Child {
    let child = Command::new("sleep").arg("60").spawn().unwrap();
    let in_sleep = || {
        let call = std::fs::read_to_string(format!("/proc/{}/syscall", child.id())).unwrap_or_default();
        call.starts_with(&format!("{} ", libc::SYS_clock_nanosleep))
    };
    while !in_sleep() {
        std::thread::sleep(Duration::from_millis(1));
    }
    child
}

fn ranges_of(pid: u32) -> Vec<Range> {
    let ranges = Ranges::of(&Maps::read(&ProcDir::open(pid).unwrap()).unwrap());
    [ranges.named, ranges.others].concat()
}

/// State of a process in `/proc/PID/stat`.
fn state(pid: u32) -> char {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    stat.rsplit(')').next().and_then(|rest| rest.trim().chars().next()).unwrap()
}

fn is_root() -> bool {
    // SAFETY: takes nothing, returns a number.
    unsafe { libc::geteuid() == 0 }
}

/// What is copied is what was there, and the process runs on afterwards.
#[test]
fn a_stop_copies_and_lets_go() {
    let mut child = sleeper();
    let ranges = ranges_of(child.id());
    let taken = take(child.id(), &ranges, MAX_COPY, Duration::from_millis(500)).unwrap();
    assert!(!taken.cut_short && taken.stopped < Duration::from_millis(500), "{:?}", taken.stopped);
    assert_eq!(taken.registers.len(), 1);
    let (tid, values) = &taken.registers[0];
    assert_eq!(*tid, child.id());
    // A sleeping thread has its stack pointer in a register.
    let stack = ranges.iter().any(|r| values.iter().any(|v| (r.start..r.end).contains(v)));
    assert!(stack, "{values:x?}");
    let maps = Maps::read(&ProcDir::open(child.id()).unwrap()).unwrap();
    let stack = maps.iter().find(|m| m.name().as_deref() == Some("[stack]")).unwrap();
    let stack = Range { start: stack.start, end: stack.end };
    let dead = taken.dead_stack(child.id(), stack);
    assert!(dead.start == stack.start && dead.end > dead.start && dead.end < stack.end, "{dead:x?} of {stack:x?}");
    let elsewhere = Range { start: 4096, end: 8192 };
    assert_eq!(taken.dead_stack(child.id(), elsewhere), Range { start: 4096, end: 4096 });
    assert!(taken.memory.bytes_copied() > 4096);
    let mut differing = 0;
    for (address, bytes) in taken.memory.pieces() {
        let mut now = vec![0; bytes.len()];
        let got = ProcessMemory::new(child.id()).read(address, &mut now);
        assert_eq!(got, bytes.len());
        differing += now.iter().zip(bytes).filter(|(now, then)| now != then).count();
    }
    // The kernel writes down the CPU that a thread goes on on (struct rseq).
    assert!(differing <= 32, "{differing} bytes differ");
    assert!("SR".contains(state(child.id())));
    assert_eq!(tracer_of(child.id()), None);
    child.kill().unwrap();
    child.wait().unwrap();
}

/// The copy is bounded, and what is not in it is read as it is now.
#[test]
fn a_copy_without_room_is_cut_short() {
    let mut child = sleeper();
    let ranges = ranges_of(child.id());
    let mut taken = take(child.id(), &ranges, 4096, Duration::from_millis(500)).unwrap();
    assert!(taken.cut_short);
    assert_eq!(taken.memory.bytes_copied(), 4096);
    let mut word = [0; 8];
    for range in &ranges {
        if taken.memory.read(range.start, &mut word) > 0 {
            let mut now = [0; 8];
            assert_eq!(ProcessMemory::new(child.id()).read(range.start, &mut now), 8);
            assert_eq!(now, word);
        }
    }
    child.kill().unwrap();
    child.wait().unwrap();
}

/// Only one process can debug another: we say who is in the way.
#[test]
fn a_process_under_a_debugger_is_refused() {
    let mut child = sleeper();
    let pid = child.id().cast_signed();
    // SAFETY: no memory is involved.
    let seized = unsafe { libc::ptrace(libc::PTRACE_SEIZE, pid, 0, 0) };
    assert!(seized == 0 || !is_root(), "{}", std::io::Error::last_os_error());
    if seized == 0 {
        let error = take(child.id(), &[], 0, Duration::from_millis(50)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Permission);
        let text = format!("{error:#}");
        // SAFETY: takes nothing, returns a number.
        let tid = unsafe { libc::gettid() };
        assert!(text.contains(&format!("process {tid} is debugging it")), "{text}");
    }
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn a_process_that_has_ended_cannot_be_stopped() {
    let mut child = sleeper();
    child.kill().unwrap();
    child.wait().unwrap();
    let error = take(child.id(), &[], 0, Duration::from_millis(50)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Target, "{error:#}");
}

/// Whoever holds the process dies: the kernel lets it go. This is what the deadline and the end of memleak rely on.
#[test]
fn a_killed_helper_leaves_nothing_stopped() {
    let mut child = sleeper();
    let pid = child.id().cast_signed();
    // SAFETY: the child makes system calls only.
    let helper = unsafe { libc::fork() };
    if helper == 0 {
        // SAFETY: as above; it is killed, or ends when the time is up.
        unsafe {
            libc::ptrace(libc::PTRACE_SEIZE, pid, 0, 0);
            libc::ptrace(libc::PTRACE_INTERRUPT, pid, 0, 0);
            libc::waitpid(pid, ptr::null_mut(), libc::__WALL);
            libc::sleep(30);
            libc::_exit(0);
        }
    }
    let wait_for = |wanted: char| {
        (0..500).any(|_| {
            std::thread::sleep(Duration::from_millis(10));
            state(child.id()) == wanted
        })
    };
    assert!(wait_for('t'), "{}", state(child.id()));
    // SAFETY: the helper is ours and has not been waited for.
    unsafe {
        libc::kill(helper, libc::SIGKILL);
        libc::waitpid(helper, ptr::null_mut(), 0);
    }
    assert!(wait_for('S'), "{}", state(child.id()));
    child.kill().unwrap();
    child.wait().unwrap();
}

/// The cap holds whatever happens: here there is far more to copy than time.
#[test]
fn the_cap_holds() {
    let mut child = sleeper();
    let one = ranges_of(child.id());
    // The same again and again: as much as there is room for.
    let many: Vec<Range> = one.iter().copied().cycle().take(60_000).collect();
    // On a machine under load the time may be over before anything stands still.
    let tries = (0..100).map(|_| take(child.id(), &many, MAX_COPY, Duration::from_millis(5)));
    let taken = tries.flatten().next().expect("there is time once in a while");
    assert!(taken.cut_short, "{}", taken.memory.bytes_copied());
    // The machine may be busy; the time of the copy is what is bounded.
    assert!(taken.stopped < Duration::from_millis(100), "{:?}", taken.stopped);
    assert!("SR".contains(state(child.id())));
    child.kill().unwrap();
    child.wait().unwrap();
}

type Life = extern "C" fn(*mut libc::c_void) -> *mut libc::c_void;

/// A process of our own making; `life` is what its first thread does, which may start others.
fn forked(life: Life) -> u32 {
    // SAFETY: the child does not return from here. It starts threads, which glibc allows after a fork.
    match unsafe { libc::fork() } {
        0 => {
            life(ptr::null_mut());
            // SAFETY: ends the child.
            unsafe { libc::_exit(0) }
        }
        child => {
            assert!(child > 0);
            child.cast_unsigned()
        }
    }
}

fn start_thread(life: Life) -> libc::pthread_t {
    let mut thread = 0;
    // SAFETY: `thread` is writable; `life` needs no argument.
    if unsafe { libc::pthread_create(&raw mut thread, ptr::null(), life, ptr::null_mut()) } != 0 {
        // SAFETY: ends the child.
        unsafe { libc::_exit(1) }
    }
    thread
}

fn end_forked(pid: u32) {
    // SAFETY: ends and waits for our own child.
    unsafe {
        libc::kill(pid.cast_signed(), libc::SIGKILL);
        libc::waitpid(pid.cast_signed(), ptr::null_mut(), libc::__WALL);
    }
}

extern "C" fn pause_for_ever(_: *mut libc::c_void) -> *mut libc::c_void {
    loop {
        // SAFETY: waits for a signal.
        unsafe { libc::pause() };
    }
}

/// Leaves another thread alone, after a while.
extern "C" fn leave_behind(_: *mut libc::c_void) -> *mut libc::c_void {
    start_thread(pause_for_ever);
    // SAFETY: ends this thread alone.
    unsafe {
        libc::usleep(300_000);
        libc::syscall(libc::SYS_exit, 0);
    }
    ptr::null_mut()
}

/// The first thread may end before the others: it stays behind as a zombie, which can be neither attached to nor waited for.
#[test]
fn a_first_thread_that_has_ended_is_left_out() {
    let pid = forked(leave_behind);
    while state(pid) != 'Z' {
        std::thread::sleep(Duration::from_millis(1));
    }
    let taken = take(pid, &[], 0, Duration::from_millis(500));
    end_forked(pid);
    let taken = taken.unwrap();
    assert_eq!(taken.registers.len(), 1);
    assert_ne!(taken.registers[0].0, pid);
}

/// It may also end after it was attached to, when only a look at it tells.
#[test]
fn a_first_thread_that_ends_meanwhile_is_not_waited_for() {
    let pid = forked(leave_behind);
    let folder = std::ffi::CString::new(format!("/proc/{pid}/task")).unwrap();
    // SAFETY: the child makes system calls only; its exit code is what `wait_for` says.
    let helper = unsafe { libc::fork() };
    if helper == 0 {
        // SAFETY: as above.
        unsafe {
            let tasks = libc::open(folder.as_ptr(), libc::O_RDONLY | libc::O_DIRECTORY);
            let tid = pid.cast_signed();
            let seized = libc::ptrace(libc::PTRACE_SEIZE, tid, 0, 0);
            let Some(looks) = looks().filter(|_| seized == 0 && tasks >= 0) else { libc::_exit(9) };
            looks.set(LOOK, LOOK);
            let mut thread = Thread { tid, state: State::Runs, signal: 0 };
            wait_for(&mut thread, tasks);
            libc::_exit(i32::from(thread.state != State::Ended));
        }
    }
    let mut status = 0;
    // SAFETY: our own child.
    unsafe { libc::waitpid(helper, &raw mut status, 0) };
    end_forked(pid);
    assert!(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0, "{status:x}");
}

extern "C" fn end_at_once(_: *mut libc::c_void) -> *mut libc::c_void {
    ptr::null_mut()
}

extern "C" fn start_threads_for_ever(_: *mut libc::c_void) -> *mut libc::c_void {
    loop {
        let thread = start_thread(end_at_once);
        // SAFETY: started above, and joined once.
        unsafe { libc::pthread_join(thread, ptr::null_mut()) };
    }
}

extern "C" fn come_and_go(unused: *mut libc::c_void) -> *mut libc::c_void {
    for _ in 0..3 {
        start_thread(start_threads_for_ever);
    }
    pause_for_ever(unused)
}

/// Threads that come and go are no reason to give up, or to blame permissions for it.
#[test]
fn threads_that_end_meanwhile_are_left_out() {
    let pid = forked(come_and_go);
    let outcomes: Vec<_> = (0..50).map(|_| take(pid, &[], 0, Duration::from_millis(500))).collect();
    let state = state(pid);
    end_forked(pid);
    for outcome in &outcomes {
        match outcome {
            Ok(taken) => assert!(taken.registers.iter().any(|(tid, _)| *tid == pid), "{:?}", taken.registers.len()),
            // On a machine under load the time may be over before all stand still.
            Err(e) => assert_eq!(e.kind(), ErrorKind::Target, "{e:#}"),
        }
    }
    assert!(outcomes.iter().any(Result::is_ok));
    assert!("SRD".contains(state), "{state}");
}

/// What is looked at decides between "has ended" and "may not": both are one error number.
#[test]
fn the_state_of_a_thread_is_told() {
    let tasks = std::fs::File::open("/proc/self/task").unwrap();
    let fd = std::os::fd::AsRawFd::as_raw_fd(&tasks);
    // SAFETY: takes nothing, returns a number.
    let own = unsafe { libc::gettid() };
    assert!(!has_ended(fd, own));
    assert!(has_ended(fd, i32::MAX));
    let mut text = [0; 32];
    for (number, expected) in [(0, "0"), (7, "7"), (4_294_967_295, "4294967295"), (10_200, "10200")] {
        let count = decimal(number, &mut text);
        assert_eq!(std::str::from_utf8(&text[..count]), Ok(expected));
    }
}
