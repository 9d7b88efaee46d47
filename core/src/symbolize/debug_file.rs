//! Finds separate debug information of a module: by build id, else by the name that the module gives.
//!
//! Source: "Debugging Information in Separate Files", GDB manual.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::image::DebugLink;
use crate::maps::elf::ElfInfo;
use crate::maps::reopen_regular;
use crate::output::text::visible;
use crate::sys;

/// Longest file whose checksum is computed, in bytes.
const MAX_CHECKED: u64 = 1 << 30;

/// A file with debug information.
#[derive(Debug)]
pub(super) struct DebugFile {
    /// The file.
    pub(super) file: File,
    /// Where it was found.
    pub(super) path: PathBuf,
    /// Only the administrator of this system can have written it.
    pub(super) trusted: bool,
}

/// The file with the debug information of `file`, which a process has mapped under the path `module`; `None` when there
/// is none below our root that belongs to it.
///
/// For placing probes: wrong symbols would have them overwrite the middle of an instruction. So nobody must have been
/// able to write it but the administrator and the owner of the mapped file.
pub(crate) fn for_probes(file: &File, module: &Path, dirs: &[PathBuf]) -> Option<File> {
    let info = ElfInfo::read(file).ok()?;
    let link = DebugLink::read(file);
    let (build_id, link) = (info.build_id.as_deref(), link.as_ref());
    let found = Search { dirs, root: None, module: Some(module), build_id, link }.find().0?;
    let (own, meta) = (file.metadata().ok()?, found.file.metadata().ok()?);
    let theirs = meta.uid() == own.uid() && meta.mode() & 0o022 == 0;
    (found.trusted || theirs).then_some(found.file)
}

/// Where to look, and for what.
pub(super) struct Search<'a> {
    /// Folders of debug information, for example `/usr/lib/debug`.
    pub(super) dirs: &'a [PathBuf],
    /// Root directory of the process, when it is not ours.
    pub(super) root: Option<&'a File>,
    /// Path of the module as the process sees it.
    pub(super) module: Option<&'a Path>,
    /// Its build id.
    pub(super) build_id: Option<&'a str>,
    /// What it says.
    pub(super) link: Option<&'a DebugLink>,
}

impl Search<'_> {
    /// The first file that belongs to the module, `None` when there is none; and why others were refused, which all have
    /// the right name.
    pub(super) fn find(&self) -> (Option<DebugFile>, Vec<String>) {
        let mut refused = Vec::new();
        for path in self.candidates() {
            // Ours first: it does not depend on the process, and a build id means the same everywhere.
            for root in [None, self.root].into_iter().take(1 + usize::from(self.root.is_some())) {
                let Some((file, trusted)) = open(root, &path) else { continue };
                match self.belongs(&file) {
                    Ok(()) => return (Some(DebugFile { file, path, trusted }), refused),
                    Err(why) => refused.push(format!("{} {why}", visible(&path.to_string_lossy()))),
                }
            }
        }
        (None, refused)
    }

    fn candidates(&self) -> Vec<PathBuf> {
        let mut paths = Vec::new();
        if let Some((first, rest)) = self.build_id.and_then(|id| id.split_at_checked(2))
            && !rest.is_empty()
        {
            paths.extend(self.dirs.iter().map(|d| d.join(".build-id").join(first).join(format!("{rest}.debug"))));
        }
        if let (Some(link), Some(folder)) = (self.link, self.module.and_then(Path::parent)) {
            let name: &OsStr = &link.name;
            paths.extend([folder.join(name), folder.join(".debug").join(name)]);
            let below = folder.strip_prefix("/").unwrap_or(folder);
            paths.extend(self.dirs.iter().map(|d| d.join(below).join(name)));
        }
        paths.retain(|p| Some(p.as_path()) != self.module);
        paths
    }

    /// A file of the right name may be of another build, and its names would be wrong; the error says why.
    fn belongs(&self, file: &File) -> Result<(), String> {
        match (self.build_id, self.link) {
            (Some(wanted), _) => match ElfInfo::read(file) {
                Ok(ElfInfo { build_id: Some(id), .. }) if id == wanted => Ok(()),
                Ok(ElfInfo { build_id: Some(id), .. }) => Err(format!("belongs to another build ({id}, not {wanted})")),
                Ok(_) => Err("has no build id".to_owned()),
                Err(e) => Err(format!("cannot be read: {e}")),
            },
            (None, Some(link)) => match file.metadata() {
                Ok(meta) if meta.len() > MAX_CHECKED => Err("is too large to be checked".to_owned()),
                _ if checksum(file).is_ok_and(|crc| crc == link.crc) => Ok(()),
                _ => Err("is not the file that was linked: its checksum differs".to_owned()),
            },
            (None, None) => Err("cannot be checked: the module has no build id".to_owned()),
        }
    }
}

/// Opens a regular file; the flag says whether only the administrator of this system can have written it.
fn open(root: Option<&File>, path: &Path) -> Option<(File, bool)> {
    let found = match root {
        Some(root) => sys::open_in_root(root, path, libc::O_PATH),
        None => std::fs::OpenOptions::new().read(true).custom_flags(libc::O_PATH | libc::O_CLOEXEC).open(path),
    };
    let file = found.and_then(|f| reopen_regular(&f)).ok()?;
    let meta = file.metadata().ok()?;
    Some((file, root.is_none() && meta.uid() == 0 && meta.mode() & 0o022 == 0))
}

fn checksum(mut file: &File) -> io::Result<u32> {
    let mut crc = flate2::Crc::new();
    let mut buffer = vec![0; 1 << 16];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(crc.sum()),
            n => crc.update(&buffer[..n]),
        }
    }
}
