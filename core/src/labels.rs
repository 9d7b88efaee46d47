//! Where a process belongs: container, pod and systemd unit, told by its cgroup path.
//!
//! The path is all that is asked: no daemon, no socket, no file of a runtime. A runtime whose paths are not known here
//! gives no container, never a wrong one: an id must have the form that the runtime gives it. Whoever may make cgroups
//! chooses their names, so the texts are hostile; their length is bounded by that of the path.

use serde::{Deserialize, Serialize};

/// What a cgroup path says; every field is `None` when it says nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Labels {
    /// Id of the container, the innermost one where they are nested: 64 hexadecimal digits, or the name with LXC and
    /// systemd-nspawn. Hostile text.
    pub container: Option<String>,
    /// What runs the container, such as `docker`, `containerd`, `cri-o`, `podman`; `None` when the path does not tell.
    pub runtime: Option<String>,
    /// Uid of the Kubernetes pod, with hyphens.
    pub pod: Option<String>,
    /// The innermost systemd unit that is no slice and no container, such as `nginx.service`. Hostile text.
    pub unit: Option<String>,
    /// The innermost slice, such as `system.slice`. Hostile text.
    pub slice: Option<String>,
}

/// Prefixes that runtimes put before the id, with what they are called.
const PREFIXES: [(&str, &str); 7] = [
    ("docker-", "docker"),
    ("cri-containerd-", "containerd"),
    ("nerdctl-", "containerd"),
    ("crio-", "cri-o"),
    ("libpod-", "podman"),
    ("lxc.payload.", "lxc"),
    ("systemd-nspawn@", "systemd-nspawn"),
];
/// Folders that runtimes without systemd put the id into.
const PARENTS: [(&str, &str); 4] =
    [("docker", "docker"), ("libpod_parent", "podman"), ("lxc", "lxc"), ("actions_job", "docker")];
/// Endings of the names of systemd's units that hold processes.
const UNITS: [&str; 5] = [".service", ".scope", ".socket", ".mount", ".swap"];

impl Labels {
    /// Reads a cgroup path, as [`crate::process::ProcessStat::cgroup`] has it.
    pub fn from_cgroup(path: &str) -> Labels {
        let mut labels = Labels::default();
        let mut parent = "";
        for part in path.split('/') {
            if let Some((id, runtime)) = container(part, parent) {
                labels.container = Some(id.to_owned());
                labels.runtime = runtime.map(str::to_owned);
                // The unit outside is the runtime's, for example docker.service.
                labels.unit = None;
            } else if part.ends_with(".slice") {
                labels.slice = Some(part.to_owned());
            } else if UNITS.iter().any(|end| part.len() > end.len() && part.ends_with(end)) {
                labels.unit = Some(part.to_owned());
            }
            if let Some(uid) = pod(part) {
                labels.pod = Some(uid);
            }
            parent = part;
        }
        labels
    }

    /// In a few words, such as `docker 0123456789ab, nginx.service`; empty when nothing is known. Hostile text.
    pub fn summary(&self) -> String {
        let container = self.container.as_deref().map(|id| {
            // People know containers by the first 12 digits.
            let short = if is_id(id) { &id[..12] } else { id };
            format!("{} {short}", self.runtime.as_deref().unwrap_or("container"))
        });
        let pod = self.pod.as_deref().map(|uid| format!("pod {uid}"));
        [container, pod, self.unit.clone()].into_iter().flatten().collect::<Vec<_>>().join(", ")
    }
}

/// Container and runtime of one part of a path.
fn container<'a>(part: &'a str, parent: &str) -> Option<(&'a str, Option<&'static str>)> {
    let name = part.strip_suffix(".scope").or_else(|| part.strip_suffix(".service")).unwrap_or(part);
    for (prefix, runtime) in PREFIXES {
        if let Some(id) = name.strip_prefix(prefix) {
            let named = matches!(runtime, "lxc" | "systemd-nspawn") && !id.is_empty();
            return (named || is_id(id)).then_some((id, Some(runtime)));
        }
    }
    // `SLICE:cri-containerd:ID`, a systemd cgroup given to a runtime that does not use systemd.
    if let Some((before, id)) = name.rsplit_once(':') {
        let runtime = PREFIXES.iter().find(|(p, _)| before.rsplit(':').next() == Some(p.trim_end_matches('-')));
        return is_id(id).then_some((id, runtime.map(|(_, r)| *r)));
    }
    let runtime = PARENTS.iter().find(|(folder, _)| *folder == parent).map(|(_, runtime)| *runtime);
    (is_id(name) || runtime == Some("lxc") && !name.is_empty()).then_some((name, runtime))
}

fn is_id(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

/// Uid of the pod: `pod0123...` below `kubepods`, or `kubepods-burstable-pod0123_....slice`.
fn pod(part: &str) -> Option<String> {
    let name = match part.strip_prefix("kubepods") {
        // With containerd's own cgroups more follows behind a colon.
        Some(rest) => rest.split(':').next()?.strip_suffix(".slice")?.rsplit_once("-pod")?.1,
        None => part.strip_prefix("pod")?,
    };
    let uid = name.replace('_', "-");
    let known = uid.len() == 36 && uid.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-')
        // Static pods have the hash of their manifest.
        || uid.len() == 32 && uid.bytes().all(|b| b.is_ascii_hexdigit());
    known.then_some(uid)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
    const POD: &str = "6f2c1f9e-93a1-4ee4-8d1b-1b7b2c0c7a11";

    /// Container, runtime, pod, unit and slice.
    fn labels(path: &str) -> [Option<String>; 5] {
        let path = path.replace("ID", ID).replace("POD_", &POD.replace('-', "_")).replace("POD", POD);
        let l = Labels::from_cgroup(&path);
        [l.container, l.runtime, l.pod, l.unit, l.slice]
    }

    fn text(s: &str) -> Option<String> {
        Some(s.to_owned())
    }

    /// Each runtime has its own way to name the cgroup of a container, with systemd and without.
    #[test]
    fn containers_of_all_known_runtimes_are_recognized() {
        for (path, runtime) in [
            ("/system.slice/docker-ID.scope", Some("docker")),
            ("/docker/ID", Some("docker")),
            ("/docker/ID/init", Some("docker")),
            ("/system.slice/nerdctl-ID.scope", Some("containerd")),
            ("/machine.slice/libpod-ID.scope/container", Some("podman")),
            ("/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-ID.scope", Some("podman")),
            ("/libpod_parent/libpod-ID", Some("podman")),
            ("/system.slice/containerd.service/ID", None),
        ] {
            let [container, r, pod, unit, _] = labels(path);
            assert_eq!((container.as_deref(), r.as_deref(), pod, unit), (Some(ID), runtime, None, None), "{path}");
        }
        assert_eq!(labels("/lxc.payload.web/system.slice/cron.service")[0], text("web"));
        assert_eq!(labels("/lxc.payload.web/system.slice/cron.service")[3], text("cron.service"));
        assert_eq!(labels("/lxc/web")[0], text("web"));
        let [container, runtime, _, unit, _] = labels("/machine.slice/systemd-nspawn@web.service/payload");
        assert_eq!((container, runtime, unit), (text("web"), text("systemd-nspawn"), None));
    }

    /// In Kubernetes the pod is what people look for.
    #[test]
    fn pods_are_recognized_with_every_driver() {
        for (path, runtime) in [
            (
                "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podPOD_.slice/cri-containerd-ID.scope",
                Some("containerd"),
            ),
            ("/kubepods.slice/kubepods-podPOD_.slice/crio-ID.scope", Some("cri-o")),
            ("/kubepods/besteffort/podPOD/ID", None),
            (
                "/system.slice/containerd.service/kubepods-besteffort-podPOD_.slice:cri-containerd:ID",
                Some("containerd"),
            ),
        ] {
            let [container, r, pod, unit, _] = labels(path);
            assert_eq!(
                (container.as_deref(), r.as_deref(), pod.as_deref(), unit),
                (Some(ID), runtime, Some(POD), None),
                "{path}"
            );
        }
        let pause = "/kubepods/burstable/pod0123456789abcdef0123456789abcdef/ID";
        assert_eq!(labels(pause)[2], text("0123456789abcdef0123456789abcdef"));
    }

    /// Services and sessions are no containers, and what only looks like one is not taken for one.
    #[test]
    fn units_are_recognized_and_nothing_is_guessed() {
        let unit = |path: &str| {
            let [container, runtime, pod, unit, slice] = labels(path);
            assert_eq!((container, runtime, pod), (None, None, None), "{path}");
            (unit, slice)
        };
        assert_eq!(unit("/system.slice/nginx.service"), (text("nginx.service"), text("system.slice")));
        let session = "/user.slice/user-1000.slice/user@1000.service/app.slice/app-x\\x2dterm.scope";
        assert_eq!(unit(session), (text("app-x\\x2dterm.scope"), text("app.slice")));
        assert_eq!(unit("/system.slice/docker.service"), (text("docker.service"), text("system.slice")));
        assert_eq!(unit("/system.slice/docker-0123.scope").0, text("docker-0123.scope"));
        assert_eq!(unit("/machine.slice/libpod-conmon-ID.scope").1, text("machine.slice"));
        assert_eq!(unit("/podcast/x"), (None, None));
        assert_eq!(unit("/.service/.slice").0, None);
        assert_eq!(unit("/"), (None, None));
        assert_eq!(unit(""), (None, None));
    }

    /// What is shown in a line of text must be short and must not need explaining.
    #[test]
    fn the_summary_is_short() {
        let of = |path: &str| Labels::from_cgroup(&path.replace("ID", ID).replace("POD", POD)).summary();
        assert_eq!(of("/docker/ID"), "docker 0123456789ab");
        assert_eq!(of("/kubepods/besteffort/podPOD/ID"), format!("container 0123456789ab, pod {POD}"));
        assert_eq!(of("/system.slice/nginx.service"), "nginx.service");
        assert_eq!(of("/"), "");
    }
}
