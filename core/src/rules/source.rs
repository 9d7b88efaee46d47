//! Where rules come from: the files embedded in the binary, and a folder whose files win over them.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::{Error, ErrorKind};

/// Largest rule file, in bytes.
const MAX_FILE: u64 = 1 << 20;
/// Folder of the shared modules below a folder of rules.
const LIB_DIR: &str = "lib";

/// Shipped rules: file name and text.
const RULES: [(&str, &str); 11] = [
    ("at_exit.lua", include_str!("../../../rules/at_exit.lua")),
    ("definitely_lost.lua", include_str!("../../../rules/definitely_lost.lua")),
    ("growth.lua", include_str!("../../../rules/growth.lua")),
    ("imbalance.lua", include_str!("../../../rules/imbalance.lua")),
    ("kernel_growth.lua", include_str!("../../../rules/kernel_growth.lua")),
    ("reachable_growth.lua", include_str!("../../../rules/reachable_growth.lua")),
    ("slow_growth.lua", include_str!("../../../rules/slow_growth.lua")),
    ("suppressions.lua", include_str!("../../../rules/suppressions.lua")),
    ("suspected.lua", include_str!("../../../rules/suspected.lua")),
    ("survival.lua", include_str!("../../../rules/survival.lua")),
    ("threshold.lua", include_str!("../../../rules/threshold.lua")),
];

/// Shipped shared modules.
const LIBRARIES: [(&str, &str); 2] = [
    ("glob.lua", include_str!("../../../rules/lib/glob.lua")),
    ("grow.lua", include_str!("../../../rules/lib/grow.lua")),
];

/// Where a rule's text comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The binary.
    Embedded,
    /// A file.
    File(PathBuf),
}

/// `built in`, or the path.
impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::Embedded => f.write_str("built in"),
            Origin::File(path) => write!(f, "{}", path.display()),
        }
    }
}

/// A Lua file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct LuaFile {
    /// Path below the folder: `growth.lua`, `lib/glob.lua`. Errors call the file so, and the same name wins.
    pub(super) name: String,
    pub(super) origin: Origin,
    pub(super) text: String,
}

/// All Lua files of a folder: text, or why it cannot be had.
pub(super) type DirFiles = BTreeMap<String, Result<String, String>>;

/// The rules and shared modules that apply, by name.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Sources {
    pub(super) rules: BTreeMap<String, LuaFile>,
    pub(super) libraries: BTreeMap<String, LuaFile>,
    /// Files that could not be read, with the reason; what they would have replaced applies.
    pub(super) unreadable: Vec<(PathBuf, String)>,
}

impl Sources {
    /// The embedded files with those of a folder put over them.
    pub(super) fn merge(dir: Option<(&Path, &DirFiles)>) -> Sources {
        let mut sources = Sources::default();
        for (name, text) in RULES {
            sources.add(name.to_owned(), Origin::Embedded, text.to_owned());
        }
        for (name, text) in LIBRARIES {
            sources.add(format!("{LIB_DIR}/{name}"), Origin::Embedded, text.to_owned());
        }
        let Some((path, files)) = dir else { return sources };
        for (name, text) in files {
            match text {
                Ok(text) => sources.add(name.clone(), Origin::File(path.join(name)), text.clone()),
                Err(why) => sources.unreadable.push((path.join(name), why.clone())),
            }
        }
        sources
    }

    fn add(&mut self, name: String, origin: Origin, text: String) {
        let map = if name.starts_with(LIB_DIR) && name.contains('/') { &mut self.libraries } else { &mut self.rules };
        map.insert(name.clone(), LuaFile { name, origin, text });
    }

    /// Shared modules as `require` names them.
    pub(super) fn modules(&self) -> BTreeMap<String, String> {
        let name = |file: &str| file.trim_start_matches("lib/").trim_end_matches(".lua").to_owned();
        self.libraries.values().map(|l| (name(&l.name), l.text.clone())).collect()
    }
}

/// Reads all rules and shared modules of a folder.
///
/// # Errors
/// The folder itself cannot be listed; a file that cannot be read is an error inside.
pub(super) fn read_dir(dir: &Path) -> crate::Result<DirFiles> {
    let mut files = DirFiles::new();
    let fix = "create it, or change or remove rules.dir";
    read_into(dir, "", &mut files)
        .map_err(|e| Error::io(format!("failed to read the rules folder {} ({fix})", dir.display()), e))?;
    let lib = dir.join(LIB_DIR);
    match read_into(&lib, "lib/", &mut files) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(Error::io(format!("failed to read the folder of shared modules {}", lib.display()), e))
        }
        _ => Ok(files),
    }
}

fn read_into(dir: &Path, prefix: &str, files: &mut DirFiles) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        // A name that is no UTF-8 cannot be named in messages either; editors' hidden files are not rules.
        let Ok(name) = entry.file_name().into_string() else { continue };
        if !name.ends_with(".lua") || name.starts_with('.') {
            continue;
        }
        match read_file(&entry.path()) {
            // Gone between listing and reading: an editor at work.
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Ok(text) => drop(files.insert(format!("{prefix}{name}"), Ok(text))),
            Err(e) => drop(files.insert(format!("{prefix}{name}"), Err(e.to_string()))),
        }
    }
    Ok(())
}

/// Reads a regular file of bounded size; a pipe or device named like a rule must not block us.
fn read_file(path: &Path) -> io::Result<String> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    let mut text = String::new();
    file.take(MAX_FILE + 1).read_to_string(&mut text)?;
    if text.len() as u64 > MAX_FILE {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("larger than {MAX_FILE} bytes")));
    }
    Ok(text)
}

/// The errors of files that could not be read.
pub(super) fn unreadable_errors(sources: &Sources) -> impl Iterator<Item = Error> {
    (sources.unreadable.iter())
        .map(|(path, why)| Error::new(ErrorKind::Io, format!("failed to read rule {}: {why}", path.display())))
}
