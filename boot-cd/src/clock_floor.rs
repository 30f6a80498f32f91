//! TLS needs a clock that is not absurdly wrong, and a node's may be: its battery is empty, or it never had one.
//!
//! PLC's certificate cannot be checked by a clock that is before the certificate's time. So the clock is raised, never
//! lowered, to the start of the node's own certificate: all of PLC's begin at the same, early time. Whoever can set a node's clock back
//! gains nothing: what is run is decided by signatures, the nonce and PLC's own time in the grant.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use commonage_init::{clock, say};

use crate::{
    ME,
    error::{Error, Result},
};

/// Raises the clock to the start of this certificate's validity.
pub fn raise(cert_pem: &str) -> Result<()> {
    let floor = not_before(cert_pem).map_err(|why| Error::Config(format!("certificate: {why}")))?;
    if SystemTime::now() < floor {
        say!(ME, "the clock is before the time of any certificate; raised until PLC tells the right one");
        clock::set(floor)?;
    }
    Ok(())
}

fn not_before(pem: &str) -> Result<SystemTime, String> {
    let (_, pem) = x509_parser::pem::parse_x509_pem(pem.as_bytes()).map_err(|e| e.to_string())?;
    let certificate = pem.parse_x509().map_err(|e| e.to_string())?;
    let seconds = certificate.validity().not_before.timestamp();
    Ok(UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds).unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_start() {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::new(vec!["node".into()]).unwrap();
        params.not_before = rcgen::date_time_ymd(2025, 1, 1);
        let pem = params.self_signed(&key).unwrap().pem();
        assert_eq!(not_before(&pem), Ok(UNIX_EPOCH + Duration::from_secs(1_735_689_600)));
        assert!(not_before("").is_err() && not_before(&pem[..200]).is_err());
    }
}
