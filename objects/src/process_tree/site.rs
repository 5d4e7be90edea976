//! Where in the tree a process is created, so that it gets its session and its parent.

use super::{Body, Creation, Phantom, Tree, When};
use crate::error::Obstacle;

/// Where in the tree a process is created.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Site {
    /// By a process, possibly with `CLONE_PARENT`.
    Process(usize, When, bool),
    /// By a phantom of that process.
    Phantom(usize, i32),
}

impl Tree<'_> {
    /// Where a child of that parent is created to be in that session; otherwise why it cannot be.
    pub(super) fn site(&mut self, parent: i32, session: i32, pid: i32) -> Result<Site, String> {
        let (creator, adopted) = self.creator(parent);
        if session == pid {
            let when = self.when_of_leader(creator, parent, pid);
            return Ok(Site::Process(creator, when, adopted));
        }
        if let Some(when) = self.when(creator, session) {
            return Ok(Site::Process(creator, when, adopted));
        }
        match self.index.get(&session) {
            Some(&leader) => self.site_by_leader(leader, parent),
            None => self.site_by_phantom(session, (creator, adopted)),
        }
    }

    /// When `creator` creates a session leader, which may be before or after its own setsid(2): in the session in
    /// which that leader has created children, and before its later siblings.
    fn when_of_leader(&self, creator: usize, parent: i32, pid: i32) -> When {
        if !self.leads(creator) {
            return When::Late;
        }
        let (before, after) = (self.born_into[creator], self.processes[creator].pid);
        let living = self.processes.iter().map(|p| (p.pid, p.parent, p.session));
        let ended = self.zombies.iter().map(|z| (z.pid, z.parent, z.session));
        let own = living.clone().chain(ended.clone());
        let mut own = own
            .filter(|(_, parent, _)| *parent == pid)
            .map(|(_, _, session)| session);
        if let Some(session) = own.find(|session| [before, after].contains(session)) {
            return if session == before {
                When::Early
            } else {
                When::Late
            };
        }
        let is_followed = |all: Vec<(i32, i32, i32)>| {
            let mut all = all.iter();
            all.any(|(id, ..)| *id == pid)
                && all.any(|(_, of, session)| *of == parent && *session == before)
        };
        match is_followed(living.collect()) || is_followed(ended.collect()) {
            true => When::Early,
            false => When::Late,
        }
    }

    /// By the leader of the session, for a parent that has adopted it.
    fn site_by_leader(&mut self, leader: usize, parent: i32) -> Result<Site, String> {
        let process = &self.processes[leader];
        if process.parent == parent {
            return Ok(Site::Process(leader, When::Late, true));
        }
        let id = match self.passing.get(&leader) {
            Some(&(id, to)) if to == parent => id,
            Some(_) => return Err(without_way(process.pid)),
            None => {
                let id = self.unused();
                self.passing.insert(leader, (id, parent));
                self.creations[leader].late.push(Creation {
                    pid: id,
                    adopted: false,
                    body: Body::Phantom(Phantom {
                        exit_signal: libc::SIGCHLD,
                        ..Phantom::default()
                    }),
                });
                if let Some(&parent) = self.index.get(&parent) {
                    self.creations[parent].adopts = true;
                }
                id
            }
        };
        Ok(Site::Phantom(leader, id))
    }

    /// An id that is unused, both in the job and here.
    fn unused(&self) -> i32 {
        let processes = self.processes.iter();
        let processes = processes.map(|p| p.highest.max(p.group).max(p.session));
        let zombies = self.zombies.iter();
        let zombies = zombies.map(|z| z.pid.max(z.group).max(z.session));
        let passing = self.passing.values().map(|(id, _)| *id);
        let highest = processes.chain(zombies).chain(passing).max().unwrap_or(0);
        let free = |id: &i32| !std::path::Path::new(&format!("/proc/{id}")).exists();
        (highest + 1..).find(free).unwrap_or(highest + 1)
    }

    /// Children of a phantom that ends must be adopted by the intended subreaper.
    pub(super) fn check_adoptions(&mut self) {
        let wrong = self.passing.iter().find(|(leader, (_, parent))| {
            let mut at = Some(**leader);
            while let Some(index) = at {
                let process = &self.processes[index];
                if process.pid == *parent {
                    return false;
                }
                if self.creations[index].adopts {
                    return true;
                }
                at = self.index.get(&process.parent).copied();
            }
            self.index.contains_key(parent)
        });
        if let Some((leader, _)) = wrong {
            let pid = self.processes[*leader].pid;
            self.obstacles.push(Obstacle::without_remedy(
                format!("session {pid}"),
                without_way(pid),
            ));
        }
    }

    /// In a session without its leader: a phantom leads it.
    fn site_by_phantom(&mut self, session: i32, parent: (usize, bool)) -> Result<Site, String> {
        let (creator, adopted) = parent;
        let first = *self.phantoms.entry(session).or_insert(parent);
        if first != parent {
            return Err(format!(
                "is in session {session}, whose leader has ended, and so is a child of another parent, \
                 which cannot be restored"
            ));
        }
        let list = self.list(creator, When::Late);
        if !list.iter().any(|b| b.pid == session) {
            list.push(Creation {
                pid: session,
                adopted,
                body: Body::Phantom(Phantom {
                    leads_session: true,
                    leads_group: true,
                    exit_signal: libc::SIGCHLD,
                    ..Phantom::default()
                }),
            });
        }
        self.creations[creator].adopts |= !adopted;
        Ok(Site::Phantom(creator, session))
    }

    /// The list to which a site adds.
    pub(super) fn list_at(&mut self, site: Site) -> &mut Vec<Creation> {
        let (creator, phantom) = match site {
            Site::Process(creator, when, _) => return self.list(creator, when),
            Site::Phantom(creator, phantom) => (creator, phantom),
        };
        let at = self.creations[creator]
            .late
            .iter()
            .position(|b| b.pid == phantom);
        let late = &mut self.creations[creator].late;
        match at.map(|at| &mut late[at].body) {
            Some(Body::Phantom(phantom)) => &mut phantom.creations,
            _ => unreachable!("a site has its phantom"),
        }
    }
}

fn without_way(session: i32) -> String {
    format!(
        "is in the session of process {session} without having been created in it, which cannot be restored"
    )
}
