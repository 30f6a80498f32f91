//! Why a boot failed, and what a person at the console or at PLC can do about it.

use std::io;

use commonage_plc_api::boot::VerifyError;

use crate::{disk::plan::PlanError, script::ScriptError};

/// Why a boot failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel refused, or a protocol of the machine's surroundings failed.
    #[error(transparent)]
    Init(#[from] commonage_init::Error),
    /// The CD's own configuration cannot be read.
    #[error("this CD's /etc/commonage/node.json cannot be used: {0}")]
    Config(String),
    /// There is no NIC.
    #[error("no Ethernet interface has appeared")]
    NoNic,
    /// PLC could not be asked, or refused.
    #[error(transparent)]
    Plc(#[from] commonage_plc_client::Error),
    /// PLC's answer must not be run.
    #[error(transparent)]
    Refused(#[from] VerifyError),
    /// The script is genuine and still makes no sense.
    #[error("the boot script cannot be run: {0}")]
    Script(#[from] ScriptError),
    /// The disks do not fit the script.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// A disk could not be read or written.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// The system's answer.
        source: io::Error,
    },
    /// The partition table could not be read or written.
    #[error("partition table of {disk}: {why}")]
    Table {
        /// Which disk.
        disk: String,
        /// What is wrong.
        why: String,
    },
    /// mke2fs failed.
    #[error("mke2fs of {device}: {why}")]
    Mke2fs {
        /// On what.
        device: String,
        /// How.
        why: String,
    },
    /// The files do not fit.
    #[error("the image partition is full: {file} needs {needed_mib} MiB, {free_mib} MiB are free")]
    Full {
        /// The file that does not fit.
        file: String,
        /// Its size and what the file system needs, rounded up.
        needed_mib: u64,
        /// What there is.
        free_mib: u64,
    },
    /// What was written is not what is read back.
    #[error("{file} was written but reads back differently: the disk loses or changes data")]
    ReadBack {
        /// Which file.
        file: String,
    },
    /// The next kernel did not start.
    #[error("{0}")]
    Kexec(String),
}

/// Results of this program.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An I/O error with what was tried.
    pub fn io(what: impl Into<String>, source: io::Error) -> Self {
        Self::Io { what: what.into(), source }
    }

    /// What a person can do.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Init(commonage_init::Error::TimedOut(_)) => "check the cable and the network's DHCP server",
            Self::Init(_) => "restart the machine; if this comes again, try a newer CD or other hardware",
            Self::Config(_) => "write a new CD for this node: commonage node iso",
            Self::NoNic => "check that the NIC is plugged in and supported by this CD's kernel",
            Self::Plc(e) if e.is_temporary() => {
                "wait, or check the network between here and PLC and that plcd runs"
            }
            Self::Plc(_) => {
                "look at this node at PLC; if it is not known there or its certificate ended, write a new CD"
            }
            Self::Refused(VerifyError::Expired(_)) => "nothing, if this is rare: PLC's answer came too late",
            Self::Refused(_) => {
                "somebody may be tampering; otherwise publish the release again, signed with the key of this CD"
            }
            Self::Script(_) => "publish a correct release: commonage release publish",
            Self::Plan(PlanError::NoDisk { .. }) => "add a disk, or publish a release that needs less",
            Self::Plan(PlanError::NoRoom { .. }) => {
                "publish a release with a smaller image partition, or erase this disk by hand: its state would be lost"
            }
            Self::Full { .. } => {
                "publish a release with fewer files or, for new disks, a larger image partition"
            }
            Self::Table { .. } | Self::Mke2fs { .. } | Self::Io { .. } => {
                "check the disk and its cable; replace it if this comes again"
            }
            Self::ReadBack { .. } => "replace the disk",
            Self::Kexec(_) => "publish a release with another kernel; with Secure Boot, switch it off",
        }
    }
}
