//! Targets in containers: other files under the same paths, the same process ids, another idea of who is root.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use memleak_tests::{Counts, Feature, Memleak, Program, image, needs};

/// The leaker in namespaces of its own, with that process id inside which the first process has.
struct Container {
    program: Program,
    /// As we see it.
    pid: u32,
}

impl Container {
    /// `script` makes the root at `$1` from the image at `$0`, and is followed by the change into it.
    fn start(namespaces: &[&str], script: &str, image: &Path, root: &Path) -> Self {
        let script = format!("{script} && exec chroot \"$1\" /service");
        let mut command = Command::new("unshare");
        command.args(namespaces).args(["--mount", "--pid", "--fork", "--kill-child", "sh", "-e", "-c", &script]);
        let program = Program::start_command(command.arg(image).arg(root));
        let children = format!("/proc/{0}/task/{0}/children", program.pid());
        let children = fs::read_to_string(children).expect("it runs");
        let pid = children.trim().parse().expect("one process in the container");
        let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
        let inside = status.lines().find_map(|l| l.strip_prefix("NStgid:")).and_then(|l| l.split('\t').next_back());
        assert_eq!(inside, Some("1"), "its process id inside");
        Container { program, pid }
    }

    /// With an overlay of a read-only image and a layer of its own, as containers have it.
    fn with_overlay(namespaces: &[&str], image: &Path, root: &Path) -> Self {
        let script = "mount -t tmpfs none \"$1\"; mkdir \"$1/upper\" \"$1/work\" \"$1/root\"; \
            mount -t overlay none -o \"lowerdir=$0,upperdir=$1/upper,workdir=$1/work\" \"$1/root\"; set -- \"$1/root\"";
        Self::start(namespaces, script, image, root)
    }
}

/// A cgroup, removed again.
struct Cgroup(PathBuf);

impl Cgroup {
    fn with(name: &str, pid: u32) -> Self {
        let path = memleak_tests::features::cgroup_root().expect("there is one").join(name);
        fs::create_dir(&path).expect("the cgroup can be made");
        fs::write(path.join("cgroup.procs"), pid.to_string()).expect("a process can be moved");
        Cgroup(path)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // Its process may take a moment to end.
        for _ in 0..100 {
            if fs::remove_dir(&self.0).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    }
}

// Two containers of one image have the same paths and process ids inside; each must get its own account, with names
// from the files of the image.
#[test]
fn containers_of_one_image_are_counted_apart() {
    needs!(Feature::Bpf, Feature::MountNamespace);
    let image = image();
    let (one, two) = (tempfile::tempdir().expect("folder"), tempfile::tempdir().expect("folder"));
    let mut first = Container::with_overlay(&[], image.path(), one.path());
    let mut second = Container::with_overlay(&[], image.path(), two.path());
    let mut memleak = Memleak::start(&["-p", &format!("{},{}", first.pid, second.pid)]);
    first.program.step("done");
    second.program.step("done");
    second.program.step("done");
    let snapshot = memleak.settled();
    assert_eq!(snapshot.totals, Counts::kept(21, 67));
    for (pid, rounds) in [(first.pid, 1), (second.pid, 2)] {
        let process = snapshot.process(pid);
        assert_eq!(process.mode, "exact");
        assert!(process.losses.values().all(|&n| n == 0), "losses: {:?}", process.losses);
        let site = snapshot.sites.iter().find(|s| s.pid == pid).expect("a site of the container");
        assert_eq!(site.counts, Counts::kept(7 * rounds, 67));
        let frame = &site.frames[0];
        assert_eq!(frame.function.as_deref(), Some("lose_some"));
        assert!(frame.file.as_deref().is_some_and(|file| file.ends_with("leaker.c")), "{frame:?}");
    }
}

// A rootless container has a user namespace, in which its root is nobody to us.
#[test]
fn container_with_a_user_namespace_is_counted_and_named() {
    needs!(Feature::Bpf, Feature::UserNamespace);
    let (image, root) = (image(), tempfile::tempdir().expect("folder"));
    let script = "mount -t tmpfs none \"$1\"; cp -r \"$0/.\" \"$1\"";
    let mut container = Container::start(&["--user", "--map-root-user"], script, image.path(), root.path());
    let mut memleak = Memleak::watch(container.pid);
    container.program.step("done");
    let snapshot = memleak.settled();
    let site = snapshot.site("lose_some");
    assert_eq!(site.counts, Counts::kept(7, 67));
    assert!(site.frames[0].file.as_deref().is_some_and(|file| file.ends_with("leaker.c")), "{:?}", site.frames[0]);
}

// People know a container by its id and a service by its unit, and expect to find both in every output.
#[test]
fn targets_are_found_by_container_and_unit_and_carry_the_labels() {
    needs!(Feature::Bpf, Feature::CgroupV2);
    let id = format!("{:064x}", 0xfeed_0000_0000_u64 + u64::from(std::process::id()));
    let (mut inside, mut unit) = (Program::start("leaker"), Program::start("leaker"));
    let mut outside = Program::start("leaker");
    let service = format!("memleak-test-{}.service", std::process::id());
    let _container = Cgroup::with(&format!("docker-{id}.scope"), inside.pid());
    let _unit = Cgroup::with(&service, unit.pid());
    let by_id = format!("target=[{{container={:?}}},{{unit={:?}}}]", &id[..60], service.trim_end_matches(".service"));
    let mut memleak = Memleak::start(&["--set", &by_id]);
    inside.step("done");
    unit.step("done");
    unit.step("done");
    outside.step("done");
    let snapshot = memleak.settled();
    assert_eq!(snapshot.totals, Counts::kept(21, 67));
    assert!(!snapshot.watches(outside.pid()));
    let label = |pid: u32, name: &str| snapshot.process(pid).labels.get(name).cloned().flatten();
    assert_eq!(label(inside.pid(), "container"), Some(id.clone()));
    assert_eq!(label(inside.pid(), "runtime").as_deref(), Some("docker"));
    assert_eq!(label(inside.pid(), "unit"), None);
    assert_eq!(label(unit.pid(), "unit"), Some(service));
    assert_eq!(label(unit.pid(), "container"), None);
    inside.kill();
    unit.kill();
}
