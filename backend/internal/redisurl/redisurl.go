// Package redisurl reads the URLs of stores in Redis and makes their connections, in the same way for every
// client library:
//
//	config, err := redisurl.Parse(u)
//	conn, err := config.Dial(ctx, &net.Dialer{}, config.Addrs[0])
//
// The README lists the forms of a URL and the parameters, for users.
package redisurl

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/fleetquota/fleetquota/backend/internal/engine"
	"github.com/fleetquota/fleetquota/quota"
)

// Schemes are the schemes that Parse knows. Those of Valkey mean the same as those of Redis.
var Schemes = []string{
	"redis", "rediss", "redis+cluster", "redis+sentinel",
	"valkey", "valkeys", "valkey+cluster", "valkey+sentinel",
	"unix",
}

// The defaults of the parameters timeout and dial_timeout, and the limits and ports that a URL may have.
const (
	DefaultTimeout     = 500 * time.Millisecond
	DefaultDialTimeout = time.Second

	minTimeout = time.Millisecond
	maxTimeout = time.Minute

	serverPort   = "6379"
	sentinelPort = "26379"
)

// Config is the content of a URL.
type Config struct {
	// Cluster is set if the servers are a Redis Cluster.
	Cluster bool
	// Socket is set if the one address is the path of a Unix socket.
	Socket bool
	// Addrs are the addresses of the server, of nodes of the cluster, or of the sentinels: host:port, at
	// least one.
	Addrs []string
	// Master is the name that the sentinels know the master by; "" without Sentinel. MasterText is the name for messages,
	// quoted, without a credential that it holds.
	Master, MasterText string
	// DB is the number of the database; 0 in a cluster.
	DB int
	// Username and Password are for the servers; "" stands for none.
	Username, Password string
	// SentinelUsername and SentinelPassword are for the sentinels; "" stands for none.
	SentinelUsername, SentinelPassword string
	// TLS is nil for connections without TLS.
	TLS *tls.Config
	// RESP2 is set for servers and proxies that do not know HELLO, and close the connection where they meet it:
	// then Dial's connections send none.
	RESP2 bool

	// Prefix begins every key; "" stands for the default.
	Prefix string
	// Strict refuses lists over several hash slots.
	Strict bool
	// Batching says which charges may share a script.
	Batching engine.Batching
	// Timeout bounds a read and a write: 1 ms to 1 minute.
	Timeout time.Duration
	// DialTimeout bounds an attempt at connecting, with its handshakes: 1 ms to 1 minute, at least Timeout by
	// default.
	DialTimeout time.Duration

	// Dialed is called for each connection, and Closed for each that ended otherwise than by a timeout. Nil calls
	// nothing. They must be set before the first connection.
	Dialed, Closed func()
	// Lost is told the address of a connection that the other side ended after the client's handshake, if the client
	// reads it all the time. Parse leaves it nil, for none.
	Lost func(addr string)
}

// LongestCall bounds the time that a client needs for a call: to wait for a connection, to make one, and to write and
// read on it.
func (c *Config) LongestCall() time.Duration { return c.DialTimeout + 3*c.Timeout }

// parser reads one URL.
type parser struct {
	c       Config
	scheme  string
	q       url.Values
	secrets []string
}

// Parse reads a URL. Its errors are quota.ErrInvalid and hold no credential.
func Parse(u *url.URL) (*Config, error) {
	// A '@' behind the host means that a password was cut at one of / ? #. Then each part of the URL may be a
	// part of the password, and none may be shown.
	if strings.Contains(u.EscapedPath()+u.RawQuery+u.EscapedFragment()+u.Opaque, "@") {
		return nil, invalid("the URL has a '@' behind its host; accepted: /, ?, # and @ in a user or password as %%2F, %%3F, %%23 and %%40, and @ in a parameter as %%40")
	}
	p := &parser{scheme: u.Scheme}
	if !slices.Contains(Schemes, p.scheme) {
		return nil, invalid("the scheme is not one of %s", strings.Join(Schemes, ", "))
	}
	var err error
	if p.q, err = url.ParseQuery(u.RawQuery); err != nil {
		return nil, invalid("the parameters cannot be read; accepted: ?name=value&name=value, with a %% as %%25")
	}
	p.findSecrets(u)
	if u.Fragment != "" || u.Opaque != "" {
		return nil, invalid("the URL has a fragment; accepted: a # in a password as %%23")
	}
	for _, step := range []func(*url.URL) error{
		p.names, p.userinfo, p.addrs, p.database, p.sentinel, p.options, p.tls,
	} {
		if err := step(u); err != nil {
			return nil, err
		}
	}
	return &p.c, nil
}

func (p *parser) clustered() bool { return strings.HasSuffix(p.scheme, "+cluster") }
func (p *parser) watched() bool   { return strings.HasSuffix(p.scheme, "+sentinel") }
func (p *parser) single() bool    { return !p.clustered() && !p.watched() }
func (p *parser) socket() bool    { return p.scheme == "unix" }

// secured are the parameters that need TLS.
var secured = []string{"ca", "server_name", "cert", "key"}

// accepted returns the names of the parameters that the scheme has.
func (p *parser) accepted() []string {
	names := []string{"prefix", "strict", "batching", "timeout", "dial_timeout", "protocol"}
	if p.socket() {
		return append(names, "db")
	}
	names = append(names, secured...)
	if p.clustered() || p.watched() {
		names = append(names, "addr", "tls")
	}
	if p.watched() {
		names = append(names, "master", "sentinel_user", "sentinel_password")
	}
	return names
}

func (p *parser) names(*url.URL) error {
	accepted := p.accepted()
	names := make([]string, 0, len(p.q))
	for name := range p.q {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		switch {
		case !slices.Contains(accepted, name):
			return invalid("unknown parameter %s; accepted with %s://: client, %s", p.show(name), p.scheme, strings.Join(accepted, ", "))
		case len(p.q[name]) > 1 && name != "addr":
			return invalid("parameter %s comes %d times; accepted: once", name, len(p.q[name]))
		}
	}
	return nil
}

func (p *parser) userinfo(u *url.URL) error {
	if u.User == nil {
		return nil
	}
	p.c.Username = u.User.Username()
	p.c.Password, _ = u.User.Password()
	if p.c.Username != "" && p.c.Password == "" {
		// Some programs read a lone name as the user, others as the password.
		return invalid("the URL has a user and no password; accepted: user:password@host or :password@host")
	}
	return nil
}

func (p *parser) addrs(u *url.URL) error {
	if p.socket() {
		switch {
		case u.Host != "":
			return invalid("the URL has the host %s; accepted: unix:///path/of/the/socket, with the password as in unix://:password@/path", p.show(u.Host))
		case strings.Trim(u.Path, "/") == "" || strings.ContainsFunc(u.Path, unicode.IsControl):
			return invalid("the path is %s; accepted: the path of a socket, as in unix:///path/of/the/socket", p.show(u.Path))
		}
		p.c.Socket, p.c.Addrs = true, []string{u.Path}
		return nil
	}
	if u.Host == "" {
		return invalid("the URL has no host; accepted: %s://host:port", p.scheme)
	}
	for i, text := range append([]string{u.Host}, p.q["addr"]...) {
		addr, ok := p.addr(text)
		if !ok {
			what := "the host"
			if i > 0 {
				what = "parameter addr"
			}
			more := ""
			if p.clustered() || p.watched() {
				more = ", and further ones as parameters addr, as in ?addr=host2:port&addr=host3:port"
			}
			return invalid("%s is %s; accepted: one host or host:port%s", what, p.show(text), more)
		}
		if !slices.Contains(p.c.Addrs, addr) {
			p.c.Addrs = append(p.c.Addrs, addr)
		}
	}
	return nil
}

// addr completes an address with the default port.
func (p *parser) addr(text string) (string, bool) {
	for _, r := range text {
		if r <= ' ' || r > '~' || strings.ContainsRune(`/?#@,;\"'`, r) {
			return "", false
		}
	}
	host, port, err := net.SplitHostPort(text)
	if err != nil {
		host, port = text, serverPort
		if p.watched() {
			port = sentinelPort
		}
		v6 := strings.HasPrefix(host, "[") && strings.HasSuffix(host, "]")
		if v6 {
			host = host[1 : len(host)-1]
		}
		if strings.ContainsAny(host, "[]") || strings.Contains(host, ":") != v6 {
			return "", false
		}
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || n == 0 || host == "" {
		return "", false
	}
	return net.JoinHostPort(host, strconv.FormatUint(n, 10)), true
}

// database reads the number of the database: it is the path, and a parameter where the path is a socket's.
func (p *parser) database(u *url.URL) error {
	text, name, example := strings.TrimPrefix(u.Path, "/"), "the path", "/0"
	given := text != ""
	if p.socket() {
		text, name, example = p.q.Get("db"), "parameter db", "db=0"
		_, given = p.q["db"]
	}
	if !given {
		return nil
	}
	n, err := strconv.ParseUint(text, 10, 31)
	if !p.socket() {
		text = u.Path
	}
	switch {
	case err != nil:
		return invalid("%s is %s; accepted: the number of a database, such as %s", name, p.show(text), example)
	case p.clustered() && n != 0:
		return invalid("%s is %s; accepted with a cluster: none, for it has only database 0", name, p.show(text))
	}
	p.c.DB = int(n)
	return nil
}

func (p *parser) sentinel(*url.URL) error {
	if !p.watched() {
		return nil
	}
	p.c.Master = p.q.Get("master")
	p.c.MasterText = p.show(p.c.Master)
	p.c.SentinelUsername, p.c.SentinelPassword = p.q.Get("sentinel_user"), p.q.Get("sentinel_password")
	switch {
	case p.c.Master == "":
		return invalid("parameter master is missing; accepted: the name that the sentinels know the master by, as in ?master=mymaster")
	case strings.ContainsFunc(p.c.Master, func(r rune) bool { return r <= ' ' || r > '~' }):
		return invalid("parameter master is %s; accepted: printable ASCII without spaces", p.c.MasterText)
	case p.c.SentinelUsername != "" && p.c.SentinelPassword == "":
		return invalid("parameter sentinel_user is there without sentinel_password; accepted: both, or the password alone")
	}
	return nil
}

func (p *parser) options(*url.URL) (err error) {
	p.c.Cluster = p.clustered()
	p.c.Prefix = p.q.Get("prefix")
	if _, there := p.q["prefix"]; there {
		bad := p.c.Prefix == "" || len(p.c.Prefix) > 64 ||
			strings.ContainsFunc(p.c.Prefix, func(r rune) bool { return r <= ' ' || r > '~' || r == '{' || r == '}' })
		if bad {
			return invalid("parameter prefix is %s; accepted: 1 to 64 printable ASCII characters, no space, no brace", p.show(p.c.Prefix))
		}
	}
	if p.c.Strict, err = p.bool("strict"); err != nil {
		return err
	}
	if err = p.batching(); err != nil {
		return err
	}
	if p.c.Timeout, err = p.duration("timeout", DefaultTimeout); err != nil {
		return err
	}
	if p.c.DialTimeout, err = p.duration("dial_timeout", max(DefaultDialTimeout, p.c.Timeout)); err != nil {
		return err
	}
	if v, there := p.q["protocol"]; there {
		if v[0] != "2" && v[0] != "3" {
			return invalid("parameter protocol is %s; accepted: 3, or 2 for a server or proxy that does not know HELLO", p.show(v[0]))
		}
		p.c.RESP2 = v[0] == "2"
	}
	return nil
}

// batchings are the values of the parameter batching.
var batchings = []string{engine.BatchAuto: "auto", engine.BatchSlot: "slot", engine.BatchAll: "all", engine.BatchNone: "none"}

func (p *parser) batching() error {
	if _, there := p.q["batching"]; !there {
		return nil
	}
	v := p.q.Get("batching")
	i := slices.Index(batchings, v)
	p.c.Batching = engine.Batching(max(i, 0))
	switch {
	case i < 0:
		return invalid("parameter batching is %s; accepted: auto, slot, all, none", p.show(v))
	case p.c.Batching == engine.BatchAll && p.c.Cluster:
		return invalid("parameter batching is all; accepted with a cluster: auto, slot, none")
	case p.c.Batching == engine.BatchAll && p.c.Strict:
		return invalid("parameter batching is all; accepted with strict=true: auto, slot, none")
	}
	return nil
}

func (p *parser) tls(*url.URL) error {
	on, err := p.bool("tls")
	if err != nil {
		return err
	}
	if p.scheme == "rediss" || p.scheme == "valkeys" || on {
		p.c.TLS = &tls.Config{MinVersion: tls.VersionTLS12}
	}
	for _, name := range secured {
		switch _, there := p.q[name]; {
		case !there || p.c.TLS != nil:
		case p.single():
			return invalid("parameter %s needs TLS; accepted with %ss://", name, p.scheme)
		default:
			return invalid("parameter %s needs TLS; accepted with tls=true", name)
		}
	}
	for _, read := range []func() error{p.authorities, p.serverName, p.certificate} {
		if err := read(); err != nil {
			return err
		}
	}
	return nil
}

func (p *parser) authorities() error {
	file, there := p.q["ca"]
	if !there {
		return nil
	}
	text, err := os.ReadFile(file[0])
	if err != nil {
		return invalid("parameter ca is %s: %v; accepted: a file of certificates in PEM form", p.show(file[0]), withoutPath(err))
	}
	p.c.TLS.RootCAs = x509.NewCertPool()
	if !p.c.TLS.RootCAs.AppendCertsFromPEM(text) {
		return invalid("parameter ca is %s, which holds no certificate; accepted: a file of certificates in PEM form", p.show(file[0]))
	}
	return nil
}

func (p *parser) serverName() error {
	name, there := p.q["server_name"]
	if !there {
		return nil
	}
	bad := name[0] == "" || strings.ContainsFunc(name[0], func(r rune) bool { return r <= ' ' || r > '~' || strings.ContainsRune(`/?#@,;\"'[]`, r) })
	if _, err := netip.ParseAddr(name[0]); bad || err != nil && strings.Contains(name[0], ":") {
		return invalid("parameter server_name is %s; accepted: the host name or the IP address that the server's certificate holds, without a port", p.show(name[0]))
	}
	p.c.TLS.ServerName = name[0]
	return nil
}

func (p *parser) bool(name string) (bool, error) {
	if _, there := p.q[name]; !there {
		return false, nil
	}
	switch v := p.q.Get(name); v {
	case "true":
		return true, nil
	case "false":
		return false, nil
	default:
		return false, invalid("parameter %s is %s; accepted: true or false", name, p.show(v))
	}
}

func (p *parser) duration(name string, otherwise time.Duration) (time.Duration, error) {
	if _, there := p.q[name]; !there {
		return otherwise, nil
	}
	d, err := time.ParseDuration(p.q.Get(name))
	if err != nil || d < minTimeout || d > maxTimeout {
		return 0, invalid("parameter %s is %s; accepted: a duration from %v to %v, such as 500ms", name, p.show(p.q.Get(name)), minTimeout, maxTimeout)
	}
	return d, nil
}

// findSecrets collects the credentials that no message may show. It must run before any other check.
func (p *parser) findSecrets(u *url.URL) {
	if u.User != nil {
		password, _ := u.User.Password()
		p.secrets = append(p.secrets, u.User.Username(), password)
	}
	for name, values := range p.q {
		for _, word := range []string{"user", "pass", "secret", "token", "auth"} {
			if strings.Contains(strings.ToLower(name), word) {
				p.secrets = append(p.secrets, values...)
				break
			}
		}
	}
	for _, name := range []string{"cert", "key"} { // the text of a key in the place of its file
		for _, v := range p.q[name] {
			if strings.Contains(v, "-----BEGIN") || strings.ContainsFunc(v, unicode.IsControl) {
				p.secrets = append(p.secrets, v)
			}
		}
	}
	p.secrets = slices.DeleteFunc(p.secrets, func(s string) bool { return s == "" })
}

// show quotes a value for a message, unless the value may be a part of a credential or contain one.
func (p *parser) show(v string) string {
	const most, telling = 64, 3
	for _, s := range p.secrets {
		if strings.Contains(v, s) || len(v) >= telling && strings.Contains(s, v) {
			return "(not shown)"
		}
	}
	if strings.Contains(v, "@") {
		return "(not shown)"
	}
	if len(v) > most {
		v = v[:most] + "…"
	}
	return strconv.Quote(v)
}

func invalid(format string, args ...any) error {
	return refusal{fmt.Errorf("redis: %w: "+format, append([]any{quota.ErrInvalid}, args...)...)}
}

// refusal is an error whose text holds no part of a credential: each value in it went through show. A credential that is a
// word of the text, such as the user "user", is there by chance, and to mask it would tell it.
type refusal struct{ error }

func (r refusal) Unwrap() error { return r.error }

// Redacted says that package backend may pass the text on, see backend.OpenFunc.
func (refusal) Redacted() bool { return true }
