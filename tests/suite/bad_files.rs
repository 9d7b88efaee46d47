//! Files of the target that are damaged, enormous, or no longer what lies on the disk: the account stays exact, and what
//! cannot be known is said.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use memleak_tests::memleak::{memleak_command, output_within};
use memleak_tests::{Counts, Feature, Memleak, Program, SiteView, needs, program_path};

fn path(name: &str) -> PathBuf {
    program_path(name).expect("it was asked for")
}

/// The program `dlopen`, which will load that library.
fn loader(library: &Path) -> Program {
    Program::start_command(Command::new(path("dlopen")).arg(library).arg("plugin_leak"))
}

/// What the plugin keeps.
const KEPT: (u64, u64) = (17, 59);

/// Place of a section's header in an ELF file of 64 bits, and the section's offset and size.
fn section(data: &[u8], name: &str) -> (u64, u64, u64) {
    let word = |at: usize| u64::from_le_bytes(data[at..at + 8].try_into().expect("8 bytes"));
    let half = |at: usize| usize::from(u16::from_le_bytes(data[at..at + 2].try_into().expect("2 bytes")));
    let (table, count, names) = (word(40) as usize, half(60), half(62));
    let names = word(table + 64 * names + 24) as usize;
    let header = (0..count).map(|n| table + 64 * n).find(|at| {
        let at = names + u32::from_le_bytes(data[*at..*at + 4].try_into().expect("4 bytes")) as usize;
        data[at..].starts_with(name.as_bytes()) && data[at + name.len()] == 0
    });
    let header = header.expect("the file has the section");
    (header as u64, word(header + 24), word(header + 32))
}

// A library whose unwind information is damaged is no reason to lose count, to crash, or to be silent.
#[test]
fn damaged_unwind_information_is_refused_and_said() {
    needs!(Feature::Bpf, Feature::Program("dlopen"), Feature::Program("libplugin.so"));
    let folder = tempfile::tempdir().expect("a folder can be made");
    let sound = fs::read(path("libplugin.so")).expect("it was built");
    let (header, offset, size) = section(&sound, ".eh_frame");
    let cut = |file: &File| file.write_all_at(&(size - 9).to_le_bytes(), header + 32);
    let scribbled = |file: &File| file.write_all_at(&vec![0x41; size as usize], offset);
    let outside = |file: &File| file.write_all_at(&(1_u64 << 40).to_le_bytes(), header + 24);
    let enormous = |file: &File| file.write_all_at(&(1_u64 << 40).to_le_bytes(), header + 32);
    type Damage<'a> = &'a dyn Fn(&File) -> std::io::Result<()>;
    let cases: [(&str, Damage<'_>, &str); 4] = [
        ("truncated", &cut, "its unwind information is malformed"),
        ("scribbled", &scribbled, "its unwind information is malformed"),
        ("outside", &outside, "its unwind information is cut off"),
        ("enormous", &enormous, "its unwind information has 1048576 MiB"),
    ];
    for (name, damage, reason) in cases {
        let library = folder.path().join(format!("lib{name}.so"));
        fs::write(&library, &sound).expect("a copy");
        damage(&File::options().write(true).open(&library).expect("the copy")).expect("a damaged copy");
        let mut program = loader(&library);
        let mut memleak = Memleak::watch(program.pid());
        program.step("loaded");
        program.step("done");
        let snapshot = memleak.settled();
        assert_eq!(snapshot.at("plugin_leak"), Counts::kept(KEPT.0, KEPT.1), "{name}: {:#?}", snapshot.callers());
        let pid = program.pid().to_string();
        let (code, text, stderr) = output_within(memleak_command().args(["doctor", "-p", &pid]));
        assert_eq!(code, Some(0), "{name}: {stderr}");
        assert!(text.contains(&format!("lib{name}.so: no unwind table: {reason}")), "{name}: {text}");
    }
}

// Whatever a program's file says of its symbols: loaders do not look at it, so it can be nonsense. That costs names.
#[test]
fn damaged_elf_structures_cost_names_only() {
    needs!(Feature::Bpf, Feature::Program("dlopen"), Feature::Program("libplugin.so"));
    let folder = tempfile::tempdir().expect("a folder can be made");
    let sound = fs::read(path("libplugin.so")).expect("it was built");
    let header_of = |name| section(&sound, name).0;
    let huge = (1_u64 << 40).to_le_bytes();
    let (symbols, strings) = (header_of(".symtab"), header_of(".strtab"));
    let (loaded_symbols, loaded_strings) = (header_of(".dynsym"), header_of(".dynstr"));
    /// Bytes that are written over others, and where.
    type Damage<'a> = &'a [(u64, &'a [u8])];
    let cases: [(&str, Damage<'_>); 7] = [
        ("sections-outside", &[(40, &huge)]),
        ("many-sections", &[(60, &[0xff, 0xff])]),
        ("no-section-names", &[(62, &[0xfe, 0xff])]),
        ("large-sections", &[(58, &[0xff, 0xff])]),
        ("enormous-symbols", &[(symbols + 32, &huge), (loaded_symbols + 32, &huge)]),
        ("strings-outside", &[(strings + 24, &huge), (loaded_strings + 24, &huge)]),
        ("wrong-link", &[(symbols + 40, &[0xff; 4]), (loaded_symbols + 40, &[0xff; 4])]),
    ];
    for (name, damage) in cases {
        let library = folder.path().join(format!("lib{name}.so"));
        fs::write(&library, &sound).expect("a copy");
        let file = File::options().write(true).open(&library).expect("the copy");
        for (at, bytes) in damage {
            file.write_all_at(bytes, *at).expect("a damaged copy");
        }
        let mut program = loader(&library);
        program.step("loaded");
        let mut memleak = Memleak::watch(program.pid());
        program.step("done");
        let snapshot = memleak.settled();
        let of_library = |site: &SiteView| {
            let module = site.frames.first().and_then(|f| f.module.as_deref());
            module.is_some_and(|module| module.ends_with(&format!("lib{name}.so")))
        };
        assert_eq!(snapshot.sum(of_library), Counts::kept(KEPT.0, KEPT.1), "{name}: {:#?}", snapshot.callers());
        let site = snapshot.sites.iter().find(|site| of_library(site)).expect("it was counted");
        assert!(site.truncated.is_none() && site.passes("main"), "{name}: {site:#?}");
        let outcome = memleak.stop();
        assert!(outcome.code == Some(0) && !outcome.stderr.contains("panicked"), "{name}: {}", outcome.stderr);
    }
}

// A file that is no ELF file any more while its process runs: it is said, and code with frame pointers is still walked.
#[test]
fn file_overwritten_while_it_is_mapped_is_refused_and_said() {
    needs!(Feature::Bpf, Feature::Program("dlopen"), Feature::Program("libplugin.so"));
    let folder = tempfile::tempdir().expect("a folder can be made");
    let library = folder.path().join("liboverwritten.so");
    fs::copy(path("libplugin.so"), &library).expect("a copy");
    let mut program = loader(&library);
    program.step("loaded");
    // Its head alone: the rest is the code that runs.
    let file = File::options().write(true).open(&library).expect("the copy");
    file.write_all_at(&[0; 64], 0).expect("it can be overwritten");
    let pid = program.pid();
    let mut memleak = Memleak::watch(pid);
    program.step("done");
    let snapshot = memleak.settled();
    let site = snapshot.sites.iter().find(|s| s.counts == Counts::kept(KEPT.0, KEPT.1)).expect("it was counted");
    assert!(site.passes("main"), "{site:#?}");
    let (code, text, stderr) = output_within(memleak_command().args(["doctor", "-p", &pid.to_string()]));
    assert_eq!(code, Some(0), "{stderr}");
    let line = text.lines().find(|line| line.contains("liboverwritten.so: no unwind table:")).unwrap_or_default();
    assert!(line.contains("malformed"), "{text}");
}

// A package is upgraded while its library is in use: stacks are unwound and named by the file that is mapped, not by the
// one that has its name now.
#[test]
fn library_upgraded_on_disk_is_unwound_and_named_by_the_old_file() {
    needs!(Feature::Bpf, Feature::Program("dlopen"), Feature::Program("libplugin.so"));
    let folder = tempfile::tempdir().expect("a folder can be made");
    let library = folder.path().join("libplugin.so");
    fs::copy(path("libplugin.so"), &library).expect("a copy");
    let mut program = loader(&library);
    program.step("loaded");
    // As package managers do it: the new file takes the name of the old one.
    let new = folder.path().join("libplugin.so.new");
    fs::copy(path("libpool.so"), &new).expect("another library");
    fs::rename(&new, &library).expect("the name can be taken over");
    let mut memleak = Memleak::watch(program.pid());
    program.step("done");
    let snapshot = memleak.settled();
    assert_eq!(snapshot.at("plugin_leak"), Counts::kept(KEPT.0, KEPT.1), "{:#?}", snapshot.callers());
    let site = snapshot.site("plugin_leak");
    assert!(site.truncated.is_none() && site.passes("main") && site.passes("_start"), "{site:#?}");
}

/// Bytes that make the enormous program enormous, and functions in it.
const FILLER: u64 = 480 << 20;
const FUNCTIONS: usize = 50_000;

/// The leaker with fifty thousand functions more and half a gigabyte of debug information.
fn enormous(folder: &Path) -> PathBuf {
    let mut code = String::from(".text\n");
    for n in 0..FUNCTIONS {
        let name = format!("a_function_with_a_name_as_long_as_those_of_large_programs_{n}");
        code += &format!(
            ".globl {name}\n.type {name},@function\n{name}:\n.cfi_startproc\npush %rbx\n.cfi_def_cfa_offset 16\n\
             .cfi_offset 3,-16\nsub ${0},%rsp\n.cfi_adjust_cfa_offset {0}\nnop\nadd ${0},%rsp\n.cfi_adjust_cfa_offset -{0}\n\
             pop %rbx\n.cfi_def_cfa_offset 8\nret\n.cfi_endproc\n.size {name},.-{name}\n",
            16 + n % 30 * 16
        );
    }
    fs::write(folder.join("many.s"), code).expect("a source");
    let filler = File::create(folder.join("filler")).expect("a file");
    // Not sparse: what is read of it must be read from somewhere.
    let block: Vec<u8> = (0..1_u32 << 20).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    (0..FILLER >> 20).for_each(|_| (&filler).write_all(&block).expect("room on the disk"));
    let program = folder.join("enormous");
    let run = |command: &mut Command| {
        let output = command.current_dir(folder).output().expect("the tool starts");
        assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    };
    let leaker = Path::new(env!("CARGO_MANIFEST_DIR")).join("programs/leaker.c");
    run(Command::new("gcc").args(["-O1", "-fomit-frame-pointer", "-o", "many", "many.s"]).arg(leaker));
    run(Command::new("objcopy").args(["--add-section", ".debug_info=filler", "many", "enormous"]));
    program
}

// Browsers and databases have hundreds of megabytes of debug information: what is needed of it is little, and so must
// be the time and the memory that it costs.
#[test]
fn program_of_half_a_gigabyte_is_watched_and_named() {
    needs!(Feature::Bpf, Feature::Command("gcc"), Feature::Command("objcopy"));
    let folder = tempfile::tempdir().expect("a folder can be made");
    let program = enormous(folder.path());
    assert!(fs::metadata(&program).expect("it was made").len() > 500_000_000);
    let mut program = Program::start_command(&mut Command::new(&program));
    let started = Instant::now();
    let mut memleak = Memleak::watch_with(program.pid(), &["--set", "collector.unwind_cache=off"]);
    let attached = started.elapsed();
    // Where the table takes a debug build longer than probes wait for it, the first stack ends early.
    let mut steps = 0;
    let is_complete = |s: &SiteView| s.truncated.is_none() && s.passes("lose_some") && s.passes("_start");
    loop {
        program.step("done");
        steps += 1;
        let snapshot = memleak.settled();
        assert_eq!(snapshot.at("lose_some"), Counts::kept(7 * steps, 67), "{:#?}", snapshot.callers());
        if snapshot.sites.iter().any(is_complete) {
            break;
        }
        assert!(started.elapsed() < Duration::from_secs(60), "{:#?}", snapshot.sites);
        std::thread::sleep(Duration::from_secs(1));
    }
    let status = fs::read_to_string(format!("/proc/{}/status", memleak.pid())).expect("memleak runs");
    let peak = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).expect("it says so").trim().to_owned();
    let kib: u64 = peak.trim_end_matches(" kB").parse().expect("a number");
    eprintln!("attached in {attached:?}, complete after {:?}, at most {} MiB", started.elapsed(), kib >> 10);
    // Half of the file would be too much; the time is that of a debug build on a busy machine.
    assert!(kib < 256 << 10, "{kib} KiB");
    assert!(attached < Duration::from_secs(30), "{attached:?}");
}
