package redisurl

import (
	"crypto/tls"
	"errors"
	"io/fs"
	"os"
	"sync"
)

// certificate reads the client's certificate.
func (p *parser) certificate() error {
	cert, there := p.q["cert"]
	key, also := p.q["key"]
	switch {
	case !there && !also:
		return nil
	case !there:
		return invalid("parameter key is there without cert; accepted: both, or neither")
	case !also:
		return invalid("parameter cert is there without key; accepted: both, or neither")
	}
	c := &clientCertificate{files: [2]string{cert[0], key[0]}}
	for i, name := range []string{"cert", "key"} {
		if _, err := os.ReadFile(c.files[i]); err != nil {
			return invalid("parameter %s is %s: %v; accepted: a file in PEM form", name, p.show(c.files[i]), withoutPath(err))
		}
	}
	if err := c.load(); err != nil {
		return invalid("parameters cert and key are %s and %s: %v; accepted: files of a certificate and of its private key in PEM form",
			p.show(cert[0]), p.show(key[0]), withoutPath(err))
	}
	p.c.TLS.GetClientCertificate = c.get
	return nil
}

// withoutPath returns an error of a file without the file's name.
func withoutPath(err error) error {
	if where := (*fs.PathError)(nil); errors.As(err, &where) {
		return where.Err
	}
	return err
}

// clientCertificate is a certificate in files, which are read again when they have changed: a renewed certificate
// needs no restart.
type clientCertificate struct {
	files [2]string // of the certificate and of its key

	mu     sync.Mutex // guards the fields below
	loaded tls.Certificate
	seen   [2]fs.FileInfo // of the files that were loaded
}

// get returns the certificate, for a handshake.
func (c *clientCertificate) get(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.changed() {
		// While the files are replaced they may be of two certificates. Then the one before serves on, and the
		// next handshake looks again.
		_ = c.load()
	}
	loaded := c.loaded
	return &loaded, nil
}

// changed reports whether a file is not the one that was loaded.
func (c *clientCertificate) changed() bool {
	for i, name := range c.files {
		now, err := os.Stat(name)
		if err == nil && (!os.SameFile(now, c.seen[i]) || !now.ModTime().Equal(c.seen[i].ModTime()) || now.Size() != c.seen[i].Size()) {
			return true
		}
	}
	return false
}

// load reads the files. It changes nothing if it fails.
func (c *clientCertificate) load() error {
	var seen [2]fs.FileInfo
	var err error
	for i, name := range c.files { // before they are read: a later change is seen then
		if seen[i], err = os.Stat(name); err != nil {
			return err
		}
	}
	pair, err := tls.LoadX509KeyPair(c.files[0], c.files[1])
	if err != nil {
		return err
	}
	c.loaded, c.seen = pair, seen
	return nil
}
