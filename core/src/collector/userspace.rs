//! The kernel side of processes, which is there only when processes are to be watched: loading it takes seconds on slow
//! machines, and a kernel without uprobes cannot.

use memleak_probes::Tracker;

use crate::{Error, ErrorKind, Result};

/// See the module.
pub(super) struct Userspace(Option<Tracker>);

impl Userspace {
    /// Loads it if it is `wanted`.
    pub(super) fn load(wanted: bool, settings: memleak_probes::Settings) -> Result<Self> {
        Ok(Userspace(wanted.then(|| Tracker::load(settings)).transpose()?))
    }

    /// It, if it is loaded.
    pub(super) fn loaded(&self) -> Option<&Tracker> {
        self.0.as_ref()
    }

    /// See [`Userspace::loaded`].
    pub(super) fn loaded_mut(&mut self) -> Option<&mut Tracker> {
        self.0.as_mut()
    }

    /// It, for what only a watched process can ask for.
    ///
    /// # Errors
    /// No processes are watched.
    pub(super) fn get(&self) -> Result<&Tracker> {
        self.loaded().ok_or_else(not_loaded)
    }

    /// See [`Userspace::get`].
    ///
    /// # Errors
    /// No processes are watched.
    pub(super) fn get_mut(&mut self) -> Result<&mut Tracker> {
        self.loaded_mut().ok_or_else(not_loaded)
    }
}

fn not_loaded() -> Error {
    Error::new(ErrorKind::Target, "no processes are watched")
}
