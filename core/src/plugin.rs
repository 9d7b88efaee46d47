//! Probe-set manifests: what a plugin is made of.
//!
//! A manifest is a TOML file that names the functions of an allocator (or of any pair of calls that acquire and
//! release something) and says what their arguments mean; see `plugins/README.md`. This module finds the manifests,
//! embedded ones and the user's, `manifest` checks them, `matching` says which files provide them. It attaches nothing.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use memleak_probes::ProbeSetSpec;

use crate::config::PluginSettings;
use crate::{Error, Result};

mod kernel;
mod manifest;
mod matching;

pub use kernel::KernelPlugin;
pub use matching::{Facts, Matching};

/// Manifests that come with the binary, by file name.
const EMBEDDED: [(&str, &str); 13] = [
    ("glibc.toml", include_str!("../../plugins/glibc.toml")),
    ("interposed.toml", include_str!("../../plugins/interposed.toml")),
    ("jemalloc.toml", include_str!("../../plugins/jemalloc.toml")),
    ("kernel-pages.toml", include_str!("../../plugins/kernel-pages.toml")),
    ("kernel-percpu.toml", include_str!("../../plugins/kernel-percpu.toml")),
    ("kernel-slab.toml", include_str!("../../plugins/kernel-slab.toml")),
    ("kernel-vmalloc.toml", include_str!("../../plugins/kernel-vmalloc.toml")),
    ("mimalloc.toml", include_str!("../../plugins/mimalloc.toml")),
    ("mmap.toml", include_str!("../../plugins/mmap.toml")),
    ("musl.toml", include_str!("../../plugins/musl.toml")),
    ("operators.toml", include_str!("../../plugins/operators.toml")),
    ("otel-memory.toml", include_str!("../../plugins/otel-memory.toml")),
    ("tcmalloc.toml", include_str!("../../plugins/tcmalloc.toml")),
];

/// Largest manifest that is read, bytes.
const MAX_MANIFEST: u64 = 1 << 20;

/// A probe set: which files provide it, and what its functions do.
#[derive(Clone, Debug)]
pub struct Plugin {
    /// What the kernel side needs; its number is the plugin's position in the list.
    pub spec: ProbeSetSpec,
    /// One line for people.
    pub description: String,
    /// Whether it runs.
    pub enabled: bool,
    /// Where the manifest came from.
    pub origin: String,
    /// Which files provide it.
    pub matching: Matching,
    /// What it is made of when it is about the kernel; `None` for processes.
    pub kernel: Option<KernelPlugin>,
}

/// Reads the embedded manifests and those of `settings.dir`, in order of their file names.
///
/// A file of the folder wins over the embedded manifest of the same file name.
///
/// # Errors
/// The folder or a file cannot be read, a manifest is wrong, two have one name, or `[plugins.NAME]` names none.
pub fn load(settings: &PluginSettings) -> Result<Vec<Plugin>> {
    let mut sources: BTreeMap<String, (String, String)> = (EMBEDDED.iter())
        .map(|(file, text)| ((*file).to_owned(), (format!("built-in {file}"), (*text).to_owned())))
        .collect();
    if let Some(dir) = &settings.dir {
        for path in manifest_files(dir)? {
            let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            sources.insert(file, (path.display().to_string(), read_manifest(&path)?));
        }
    }
    let mut plugins: Vec<Plugin> = Vec::new();
    for (origin, text) in sources.values() {
        let plugin = manifest::parse(text, origin, plugins.len())?;
        if let Some(first) = plugins.iter().find(|p| p.spec.name == plugin.spec.name) {
            let message = format!("{origin}: the name \"{}\" is taken by {}", plugin.spec.name, first.origin);
            return Err(Error::config(message));
        }
        plugins.push(plugin);
    }
    for (name, enabled) in &settings.enabled {
        let Some(plugin) = plugins.iter_mut().find(|p| p.spec.name == *name) else {
            let known: Vec<&str> = plugins.iter().map(|p| p.spec.name.as_str()).collect();
            return Err(Error::config(format!("[plugins.{name}]: no such probe set; there are {}", known.join(", "))));
        };
        plugin.enabled = *enabled;
    }
    Ok(plugins)
}

fn manifest_files(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(dir).map_err(|e| {
        Error::io(format!("failed to read the folder of probe sets {} (plugins.dir)", dir.display()), e)
    })?;
    let mut files: Vec<PathBuf> = entries
        .filter_map(|e| e.ok().map(|e| e.path()))
        .filter(|p| p.extension().is_some_and(|x| x == "toml"))
        .collect();
    files.sort();
    Ok(files)
}

fn read_manifest(path: &Path) -> Result<String> {
    let failed = |e| Error::io(format!("failed to read probe set {}", path.display()), e);
    let size = std::fs::metadata(path).map_err(failed)?.len();
    if size > MAX_MANIFEST {
        return Err(Error::config(format!(
            "{}: {size} bytes is no probe set (at most {MAX_MANIFEST})",
            path.display()
        )));
    }
    std::fs::read_to_string(path).map_err(failed)
}

#[cfg(test)]
mod tests {
    use memleak_probes::Size;

    use super::manifest::parse;
    use super::*;

    const POOL: &str = r#"
        name = "pool"
        kind = "userspace"
        [match]
        sonames = ["libpool.so*"]
        [[function]]
        symbol = "pool_get"
        role = "alloc"
        size = { const = 24 }
        [[function]]
        symbol = "pool_put"
        role = "free"
        old = { arg = 1 }
    "#;

    fn error(text: &str) -> String {
        parse(text, "pool.toml", 0).unwrap_err().to_string()
    }

    /// The shipped manifests are what most users rely on.
    #[test]
    fn embedded_manifests_are_valid_and_mmap_is_off() {
        let plugins = load(&PluginSettings::default()).unwrap();
        let on: Vec<(&str, bool)> = plugins.iter().map(|p| (p.spec.name.as_str(), p.enabled)).collect();
        let of_processes = ["glibc", "interposed", "jemalloc", "mimalloc", "musl", "operators", "tcmalloc"];
        let of_the_kernel = ["kernel-percpu", "kernel-slab", "kernel-vmalloc"];
        let on_by_default = of_processes.into_iter().chain(of_the_kernel);
        let mut expected: Vec<(&str, bool)> = on_by_default.map(|name| (name, true)).collect();
        expected.extend([("kernel-pages", false), ("mmap", false), ("otel-memory", false)]);
        expected.sort_unstable();
        assert_eq!(on, expected);
    }

    /// A set of the user's own needs nothing but a manifest.
    #[test]
    fn a_manifest_says_roles_and_arguments() {
        let plugin = parse(POOL, "pool.toml", 3).unwrap();
        assert_eq!(plugin.spec.number, 3);
        assert_eq!(plugin.spec.domain, "memory");
        assert_eq!(plugin.spec.functions[0].size, Size::Constant(24));
        assert_eq!(plugin.spec.functions[1].block_arg, Some(1));
        assert!(plugin.matching.fits("/usr/lib/libpool.so.2", &Facts::default()));
    }

    /// Every mistake is named with the file and the function.
    #[test]
    fn mistakes_are_named() {
        assert!(error(&POOL.replace("pool_put", "pool_get")).contains("function pool_get: named twice"));
        assert!(error(&POOL.replace("arg = 1", "arg = 6")).contains("argument 6 cannot be read"));
        assert!(error(&POOL.replace("role = \"free\"", "role = \"alloc\"")).contains("is it a \"realloc\"?"));
        assert!(error(&POOL.replace("const = 24", "const = 24, arg = 1")).contains("size is {"));
        assert!(error(&POOL.replace("libpool.so*", "lib[")).contains("match.sonames"));
        let usdt = POOL.replace("userspace", "usdt");
        assert!(error(&usdt).contains("provider:name"));
        let usdt = usdt.replace("pool_get", "pool:get").replace("pool_put", "pool:put");
        assert!(error(&usdt).contains("function pool:get: a tracepoint does not return"));
        let both = POOL.replace("symbol = \"pool_get\"", "symbol = \"pool_get\"\nsymbols = [\"other\"]");
        assert!(error(&both).contains("a symbol or a list of symbols"));
        let prefixes = POOL.replace("[match]", "[match]\nprefixes = []");
        assert!(error(&prefixes).contains("match.prefixes is empty"));
        assert!(error(&POOL.replace("sonames = [\"libpool.so*\"]", "")).contains("neither sonames nor defines"));
        let unknown = error(&POOL.replace("symbol = \"pool_get\"", "symbole = \"pool_get\""));
        assert!(unknown.contains("line 7") && unknown.contains("symbole"), "{unknown}");
        assert!(
            error("name = \"x\"\nkind = \"userspace\"\n[match]\nsonames = [\"a\"]").contains("no function hands out")
        );
    }

    /// Switching on what does not exist is a mistake, not a wish.
    #[test]
    fn an_unknown_set_in_the_settings_is_an_error() {
        let settings = PluginSettings { enabled: [("jemaloc".to_owned(), true)].into(), ..PluginSettings::default() };
        assert!(load(&settings).unwrap_err().to_string().contains("there are glibc, interposed, jemalloc, "));
    }
}
