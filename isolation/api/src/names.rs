//! Names and identifiers, checked when they are made.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Why a name or an identifier was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Not the form of a site's name.
    #[error("{0:?} is no site name: 1 to 16 lower-case letters or digits, a letter first")]
    Site(String),
    /// Not the form of a slice's name.
    #[error(
        "{0:?} is no slice name: a site name, an underscore and 1 to 15 lower-case letters, digits or hyphens"
    )]
    Slice(String),
    /// Not 32 hexadecimal digits.
    #[error("an rcap is 32 hexadecimal digits (128 bits)")]
    Rcap,
    /// Not a UUID.
    #[error("{0:?} is no node id: a UUID like 3f0e4a52-…")]
    Node(String),
}

macro_rules! text_type {
    ($name:ident) => {
        impl TryFrom<String> for $name {
            type Error = NameError;
            fn try_from(s: String) -> Result<Self, NameError> {
                s.parse()
            }
        }
        impl From<$name> for String {
            fn from(v: $name) -> String {
                v.to_string()
            }
        }
    };
}

/// A site's short name: 1 to 16 lower-case letters or digits, a letter first (`princeton`).
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SiteName(String);

impl SiteName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for SiteName {
    type Err = NameError;
    fn from_str(s: &str) -> Result<Self, NameError> {
        let ok = (1..=16).contains(&s.len())
            && s.starts_with(|c: char| c.is_ascii_lowercase())
            && s.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
        if ok { Ok(Self(s.to_owned())) } else { Err(NameError::Site(shown(s))) }
    }
}

impl fmt::Display for SiteName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
text_type!(SiteName);

/// A slice's name, `site_slice`: at most 32 bytes, safe as a file name, a host name and a login name.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SliceName(String);

impl SliceName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The site the slice belongs to.
    pub fn site(&self) -> SiteName {
        SiteName(self.0.split('_').next().unwrap_or_default().to_owned())
    }
}

impl FromStr for SliceName {
    type Err = NameError;
    fn from_str(s: &str) -> Result<Self, NameError> {
        let ok = s.split_once('_').is_some_and(|(site, rest)| {
            site.parse::<SiteName>().is_ok()
                && (1..=15).contains(&rest.len())
                && rest.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
                && !rest.starts_with('-')
                && !rest.ends_with('-')
        });
        if ok { Ok(Self(s.to_owned())) } else { Err(NameError::Slice(shown(s))) }
    }
}

impl fmt::Display for SliceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
text_type!(SliceName);

/// A node's persistent identifier, a UUID in its canonical lower-case form. It names the node's role: address, host name and disk may change.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct NodeId(String);

impl NodeId {
    /// The identifier as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for NodeId {
    type Err = NameError;
    fn from_str(s: &str) -> Result<Self, NameError> {
        let ok = s.len() == 36
            && s.bytes().enumerate().all(|(i, b)| match i {
                8 | 13 | 18 | 23 => b == b'-',
                _ => b.is_ascii_digit() || (b'a'..=b'f').contains(&b),
            });
        if ok { Ok(Self(s.to_owned())) } else { Err(NameError::Node(shown(s))) }
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
text_type!(NodeId);

/// A resource capability: 128 random bits, written as 32 hexadecimal digits. Whoever holds it may use it, so it is a secret:
/// `Debug` and logs show its first four digits only.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Rcap([u8; 16]);

impl Rcap {
    /// A new one from the kernel's random numbers.
    ///
    /// # Errors
    /// The kernel's random source cannot be read.
    pub fn random() -> Result<Self, getrandom::Error> {
        let mut bits = [0; 16];
        getrandom::fill(&mut bits)?;
        Ok(Self(bits))
    }
}

impl FromStr for Rcap {
    type Err = NameError;
    fn from_str(s: &str) -> Result<Self, NameError> {
        let mut bits = [0; 16];
        hex::decode_to_slice(s, &mut bits).map_err(|_| NameError::Rcap)?;
        Ok(Self(bits))
    }
}

impl fmt::Display for Rcap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for Rcap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Rcap({:02x}{:02x}…)", self.0[0], self.0[1])
    }
}
text_type!(Rcap);

/// Hostile text in an error message is cut, so that a message stays a line.
fn shown(s: &str) -> String {
    s.chars().take(40).collect()
}
