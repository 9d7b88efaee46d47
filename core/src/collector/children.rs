//! Children that a watched process forks and that are not to be watched themselves.
//!
//! They inherit the breakpoints and would pay for each hit until somebody detaches, so they are released. Most children
//! call exec at once, which rids them of everything; only those that live on are worth the effort.

use super::{Collector, Life};
use crate::process::ProcDir;

/// A child that has not called exec by then is going to run the parent's program, seconds.
const SETTLED_S: f64 = 0.3;
/// A process's children are released at most this often, seconds: each time takes some 50 ms, mostly waiting.
const RELEASE_EVERY_S: f64 = 1.0;
/// Most children that are remembered; one of those that are forgotten keeps its breakpoints until the next release.
const MAX_CHILDREN: usize = 4096;

/// A child that nobody watches.
#[derive(Clone, Copy, Debug)]
pub(super) struct Child {
    pid: u32,
    /// Instance of its parent.
    parent: u32,
    forked_s: f64,
}

impl Collector {
    /// A watched process has forked; the child may be watched by now.
    pub(super) fn note_child(&mut self, parent: u32, pid: u32) {
        let watched = self.watched.values().any(|w| w.life == Life::Running && w.process.pid == pid);
        if !watched && self.children.len() < MAX_CHILDREN {
            self.children.push(Child { pid, parent, forked_s: self.now_s() });
        }
    }

    /// A process runs a new program: its breakpoints are gone.
    pub(super) fn forget_child(&mut self, pid: u32) {
        self.children.retain(|child| child.pid != pid);
    }

    /// Releases the children that live on.
    pub(super) fn release_children(&mut self) {
        let now_s = self.now_s();
        if self.children.is_empty() || now_s < self.next_release_s {
            return;
        }
        let settled = |child: &Child| now_s - child.forked_s >= SETTLED_S;
        let runs = |pid| ProcDir::open(pid).and_then(|dir| dir.stat()).is_ok_and(|stat| stat.is_running());
        let mut parents: Vec<u32> =
            self.children.iter().filter(|c| settled(c) && runs(c.pid)).map(|c| c.parent).collect();
        self.children.retain(|child| !settled(child));
        parents.sort_unstable();
        parents.dedup();
        for parent in parents {
            self.next_release_s = now_s + RELEASE_EVERY_S;
            // The younger ones are released with them.
            self.children.retain(|child| child.parent != parent);
            if let Err(e) = self.tracker.get_mut().and_then(|t| Ok(t.release_children(parent)?)) {
                tracing::debug!(instance = parent, "children stay slowed down until the next detach: {e}");
            }
        }
    }
}
