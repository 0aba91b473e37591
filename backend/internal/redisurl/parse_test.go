package redisurl

import (
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/backend/internal/engine"
	"github.com/fleetquota/fleetquota/quota"
)

func parse(t *testing.T, text string) (*Config, error) {
	t.Helper()
	u, err := url.Parse(text)
	if err != nil {
		t.Fatal(err)
	}
	return Parse(u)
}

func TestParse(t *testing.T) {
	base := func(change func(*Config)) *Config {
		c := &Config{Addrs: []string{"host:6379"}, Timeout: DefaultTimeout, DialTimeout: DefaultDialTimeout}
		change(c)
		return c
	}
	for text, want := range map[string]*Config{
		"redis://host":               base(func(*Config) {}),
		"redis://host/":              base(func(*Config) {}),
		"redis://host:6379/0":        base(func(*Config) {}),
		"redis://host:007/12":        base(func(c *Config) { c.Addrs, c.DB = []string{"host:7"}, 12 }),
		"redis://host/2147483647":    base(func(c *Config) { c.DB = 1<<31 - 1 }),
		"redis://[::1]":              base(func(c *Config) { c.Addrs = []string{"[::1]:6379"} }),
		"redis://[::1]:1":            base(func(c *Config) { c.Addrs = []string{"[::1]:1"} }),
		"redis://u:p@host":           base(func(c *Config) { c.Username, c.Password = "u", "p" }),
		"redis://:p@host":            base(func(c *Config) { c.Password = "p" }),
		"redis://:@host":             base(func(*Config) {}),
		"redis://u%40:p%2F%3a@host":  base(func(c *Config) { c.Username, c.Password = "u@", "p/:" }),
		"redis://u:p@q@host":         base(func(c *Config) { c.Username, c.Password = "u", "p@q" }),
		"redis://host?prefix=a%23:":  base(func(c *Config) { c.Prefix = "a#:" }),
		"redis://host?strict=true":   base(func(c *Config) { c.Strict = true }),
		"redis://host?strict=false":  base(func(*Config) {}),
		"redis://host?batching=auto": base(func(*Config) {}),
		"redis://host?batching=slot": base(func(c *Config) { c.Batching = engine.BatchSlot }),
		"valkey://host?batching=all": base(func(c *Config) { c.Batching = engine.BatchAll }),
		"redis://host?batching=none": base(func(c *Config) { c.Batching = engine.BatchNone }),
		"redis://host?timeout=50ms":  base(func(c *Config) { c.Timeout = 50 * time.Millisecond }),
		"redis://host?timeout=3s":    base(func(c *Config) { c.Timeout, c.DialTimeout = 3*time.Second, 3*time.Second }),
		"redis://host?dial_timeout=1m": base(func(c *Config) {
			c.DialTimeout = time.Minute
		}),
		"redis://host?protocol=2": base(func(c *Config) { c.RESP2 = true }),
		"redis://host?protocol=3": base(func(*Config) {}),
		"unix:///run/redis.sock":  base(func(c *Config) { c.Socket, c.Addrs = true, []string{"/run/redis.sock"} }),
		"unix://u:p%2F@/run/my%20redis.sock?db=3&timeout=50ms&protocol=2": base(func(c *Config) {
			c.Socket, c.Addrs, c.DB, c.RESP2 = true, []string{"/run/my redis.sock"}, 3, true
			c.Username, c.Password, c.Timeout = "u", "p/", 50*time.Millisecond
		}),
		"redis+cluster://host": base(func(c *Config) { c.Cluster = true }),
		"redis+cluster://host/0?addr=b:1&addr=host:6379&addr=[::2]&tls=false": base(func(c *Config) {
			c.Cluster, c.Addrs = true, []string{"host:6379", "b:1", "[::2]:6379"}
		}),
		"redis+sentinel://host/3?master=m": base(func(c *Config) {
			c.Addrs, c.Master, c.MasterText, c.DB = []string{"host:26379"}, "m", `"m"`, 3
		}),
		"redis+sentinel://u:p@host:1?addr=b&master=m&sentinel_user=v&sentinel_password=q%40": base(func(c *Config) {
			c.Addrs, c.Master, c.MasterText = []string{"host:1", "b:26379"}, "m", `"m"`
			c.Username, c.Password, c.SentinelUsername, c.SentinelPassword = "u", "p", "v", "q@"
		}),
	} {
		got, err := parse(t, text)
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s: got %+v, error %v; want %+v", text, got, err, want)
		}
	}
}

func TestParseTLS(t *testing.T) {
	for text, want := range map[string]bool{
		"redis://host": false, "redis+cluster://host": false, "redis+cluster://host?tls=false": false, "redis+sentinel://host?master=m": false,
		"rediss://host": true, "redis+cluster://host?tls=true": true, "redis+sentinel://host?master=m&tls=true": true,
	} {
		c, err := parse(t, text)
		if err != nil || (c.TLS != nil) != want {
			t.Errorf("%s: got %+v, error %v; want TLS=%v", text, c, err, want)
			continue
		}
		if want && (c.TLS.MinVersion != 0x0303 || c.TLS.InsecureSkipVerify || c.TLS.ServerName != "" || c.TLS.RootCAs != nil) {
			t.Errorf("%s: got %+v, want TLS 1.2 or later and the system's authorities", text, c.TLS)
		}
	}
}

func TestServerName(t *testing.T) {
	for text, want := range map[string]string{
		"rediss://10.0.0.7?server_name=redis.example.com":    "redis.example.com",
		"redis+cluster://h?tls=true&server_name=fd00::1":     "fd00::1",
		"redis+sentinel://h?master=m&tls=true&server_name=r": "r",
		"valkeys://h": "",
	} {
		c, err := parse(t, text)
		if err != nil || c.TLS.ServerName != want {
			t.Errorf("%s: got %+v, error %v; want the name %q", text, c, err, want)
		}
	}
}

func TestParseRefuses(t *testing.T) {
	dir := t.TempDir()
	empty := filepath.Join(dir, "empty.pem")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	cert, key := writePair(t, dir, "first")
	_, other := writePair(t, dir, "other")
	for _, test := range []struct{ url, says string }{
		{"redis://", "no host; accepted: redis://host:port"},
		{"redis:///0", "no host"},
		{"redis://u:p@", "no host"},
		{"redis://:6379", `the host is ":6379"; accepted: one host or host:port`},
		{"redis://host:0", `the host is "host:0"`},
		{"redis://host:65536", `the host is "host:65536"`},
		{"redis://host:", `the host is "host:"`},
		{"redis://a,b", `the host is "a,b"`},
		{"redis+cluster://a,b", "as in ?addr=host2:port&addr=host3:port"},
		{"redis+cluster://a?addr=b,c", `parameter addr is "b,c"`},
		{"redis+cluster://a?addr=", `parameter addr is ""`},
		{"redis+cluster://a?addr=b:x", `parameter addr is "b:x"`},
		{"redis+cluster://a?addr=::1", `parameter addr is "::1"`},
		{"redis+cluster://a?addr=[::1", `parameter addr is "[::1"`},
		{"redis+cluster://a?addr=b]", `parameter addr is "b]"`},
		{"redis+cluster://a?addr=redis://b", `parameter addr is "redis://b"`},
		{"redis+cluster://a?addr=u:hunter2%40b", "parameter addr is (not shown)"},
		{"redis://host?addr=b", `unknown parameter "addr"; accepted with redis://: client, prefix, strict, batching, timeout, dial_timeout, protocol, ca, server_name, cert, key`},
		{"redis://host?master=m", `unknown parameter "master"`},
		{"redis+cluster://host?master=m", `unknown parameter "master"; accepted with redis+cluster://: client, prefix, strict, batching, timeout, dial_timeout, protocol, ca, server_name, cert, key, addr, tls`},
		{"redis://host?tls=true", `unknown parameter "tls"`},
		{"rediss://host?tls=true", `unknown parameter "tls"`},
		{"redis://host?Timeout=1s", `unknown parameter "Timeout"`},
		{"redis://host?db=1", `unknown parameter "db"`},
		{"redis://host?password=hunter2", `unknown parameter "password"`},
		{"redis://host?hunter2@x", "a '@' behind its host"},
		{"redis://host/hunter2@x", "a '@' behind its host"},
		{"redis://host#hunter2@x", "a '@' behind its host"},
		{"redis://host#f", "fragment"},
		{"redis:opaque", "fragment"},
		{"redis://host?a;b", "parameters cannot be read"},
		{"redis://host?timeout=%zz", "parameters cannot be read"},
		{"redis://host?timeout=1s&timeout=1s", "parameter timeout comes 2 times; accepted: once"},
		{"redis+sentinel://host?master=m&master=m", "parameter master comes 2 times"},
		{"redis://host?timeout=1", `parameter timeout is "1"; accepted: a duration from 1ms to 1m0s, such as 500ms`},
		{"redis://host?timeout=", `parameter timeout is ""`},
		{"redis://host?timeout=0s", `parameter timeout is "0s"`},
		{"redis://host?timeout=-1s", `parameter timeout is "-1s"`},
		{"redis://host?timeout=61s", `parameter timeout is "61s"`},
		{"redis://host?dial_timeout=1h", `parameter dial_timeout is "1h"`},
		{"redis://host?strict=1", `parameter strict is "1"; accepted: true or false`},
		{"redis://host?strict", `parameter strict is ""`},
		{"redis://host?batching=many", `parameter batching is "many"; accepted: auto, slot, all, none`},
		{"redis://host?batching=", `parameter batching is ""; accepted: auto, slot, all, none`},
		{"redis+cluster://host?batching=all", `parameter batching is all; accepted with a cluster: auto, slot, none`},
		{"redis://host?batching=all&strict=true", `parameter batching is all; accepted with strict=true: auto, slot, none`},
		{"redis+cluster://host?tls=yes", `parameter tls is "yes"`},
		{"redis://host?prefix=", `parameter prefix is ""; accepted: 1 to 64`},
		{"redis://host?prefix=a%20b", `parameter prefix is "a b"`},
		{"redis://host?prefix=%7Ba%7D", `parameter prefix is "{a}"`},
		{"redis://host?prefix=" + strings.Repeat("x", 65), "…"},
		{"redis://host/1/2", `the path is "/1/2"; accepted: the number of a database, such as /0`},
		{"redis://host/x", `the path is "/x"`},
		{"redis://host/-1", `the path is "/-1"`},
		{"redis://host/+1", `the path is "/+1"`},
		{"redis://host/2147483648", `the path is "/2147483648"`},
		{"redis+cluster://host/1", `the path is "/1"; accepted with a cluster: none`},
		{"redis://hunter2@host", "a user and no password"},
		{"redis://hunter2:@host", "a user and no password"},
		{"redis+sentinel://host", "parameter master is missing"},
		{"redis+sentinel://host?master=", "parameter master is missing"},
		{"redis+sentinel://host?master=a%20b", `parameter master is "a b"`},
		{"redis+sentinel://host?master=m&sentinel_user=hunter2", "sentinel_user is there without sentinel_password"},
		{"redis+sentinel://host?master=m&sentinel_password=hunter2&sentinel_password=hunter2", "parameter sentinel_password comes 2 times"},
		{"rediss://host?ca=/no/such/file", `parameter ca is "/no/such/file": no such file or directory; accepted: a file of certificates in PEM form`},
		{"rediss://host?ca=" + empty, "holds no certificate"},
		{"rediss://host?ca=", `parameter ca is ""`},
		{"redis://host?ca=" + empty, "parameter ca needs TLS; accepted with rediss://"},
		{"redis+cluster://host?ca=" + empty, "parameter ca needs TLS; accepted with tls=true"},
		{"redis+cluster://host?tls=false&ca=" + empty, "parameter ca needs TLS; accepted with tls=true"},
		{"memory://host", "the scheme is not one of"},
		{"redis://host?server_name=h", "parameter server_name needs TLS; accepted with rediss://"},
		{"valkey://host?server_name=h", "parameter server_name needs TLS; accepted with valkeys://"},
		{"redis+sentinel://host?master=m&server_name=h", "parameter server_name needs TLS; accepted with tls=true"},
		{"rediss://host?server_name=", `parameter server_name is ""; accepted: the host name or the IP address`},
		{"rediss://host?server_name=h:6380", `parameter server_name is "h:6380"`},
		{"rediss://host?server_name=a%20b", `parameter server_name is "a b"`},
		{"redis://host?cert=" + cert + "&key=" + key, "parameter cert needs TLS; accepted with rediss://"},
		{"rediss://host?cert=" + cert, "parameter cert is there without key; accepted: both, or neither"},
		{"rediss://host?key=" + key, "parameter key is there without cert"},
		{"rediss://host?cert=/no/such/file&key=" + key, `parameter cert is "/no/such/file": no such file or directory; accepted: a file in PEM form`},
		{"rediss://host?key=/no/such/file&cert=" + cert, `parameter key is "/no/such/file": no such file`},
		{"rediss://host?key=" + empty + "&cert=" + cert, "parameters cert and key are"},
		{"rediss://host?key=" + other + "&cert=" + cert, "private key does not match public key; accepted: files of a certificate and of its private key"},
		{"rediss://host?cert=" + cert + "&key=-----BEGIN%20PRIVATE%20KEY-----hunter2", "parameter key is (not shown)"},
		{"redis://host?protocol=1", `parameter protocol is "1"; accepted: 3, or 2 for a server or proxy that does not know HELLO`},
		{"redis://host?protocol=", `parameter protocol is ""`},
		{"unix://run/redis.sock", `the URL has the host "run"; accepted: unix:///path/of/the/socket`},
		{"unix://:hunter2@run/redis.sock", `the URL has the host "run"`},
		{"unix://:hunter2@", `the path is ""; accepted: the path of a socket`},
		{"unix:///", `the path is "/"`},
		{"unix:///a%00b", `the path is "/a\x00b"`},
		{"unix:///:hunter2@/redis.sock", "a '@' behind its host"},
		{"unix:///run/redis.sock?db=x", `parameter db is "x"; accepted: the number of a database, such as db=0`},
		{"unix:///run/redis.sock?db=", `parameter db is ""`},
		{"unix:///run/redis.sock?ca=x", `unknown parameter "ca"; accepted with unix://: client, prefix, strict, batching, timeout, dial_timeout, protocol, db`},
		{"unix://:hunter2@/run/hunter2.sock/?db=hunter2", "parameter db is (not shown)"},
		// A value that has to do with a credential.
		{"redis://:hunter2@host?timeout=hunter2", "parameter timeout is (not shown)"},
		{"redis://:hunter2@host?hunter2x=1", "unknown parameter (not shown)"},
		{"redis://:hunter2@host?timeout=unter", "parameter timeout is (not shown)"},
		{"redis://hunter2:p@host/hunter2", "the path is (not shown)"},
		{"redis://:hunter2@xhunter2x:0", "the host is (not shown)"},
		{"redis://host?auth_token=hunter2&zz=1", `unknown parameter "auth_token"`},
		{"redis+sentinel://host:1?master=m&sentinel_password=hunter2&strict=hunter2", "parameter strict is (not shown)"},
	} {
		c, err := parse(t, test.url)
		if !errors.Is(err, quota.ErrInvalid) || c != nil {
			t.Errorf("%s: got %+v, error %v; want ErrInvalid", test.url, c, err)
			continue
		}
		if text := err.Error(); !strings.Contains(text, test.says) || strings.Contains(text, "unter") || len(text) > 400 {
			t.Errorf("%s: got error %v, want one that says %q", test.url, err, test.says)
		}
	}
}

// hostile are passwords that URL parsers stumble over, decoded.
var hostile = []string{
	"hunter2", "hun@ter2", "@hunter2", "hunter2@host:6379/0", "x@127.0.0.1:1?strict=hunter2", "a:hunter2", "/hunter2", "?hunter2", "#hunter2",
	"hunter2?timeout=x", "%68unter2", "100%hunter2", "hunter2\x00", "hunter2\r\nPING", "hunter2 \"'`", "[hunter2", "hunter2;a", "\xffhunter2", "+hunter2&x",
	"redis://u:hunter2@h", strings.Repeat("hunter2", 100),
}

func TestPasswordsArriveWhole(t *testing.T) {
	for _, password := range hostile {
		for _, escaped := range []string{url.PathEscape(password), url.QueryEscape(password), url.UserPassword("u", password).String()[2:]} {
			if strings.Contains(escaped, "+") && !strings.Contains(password, "+") {
				continue // QueryEscape's '+' is no space in a userinfo
			}
			c, err := parse(t, "redis://u:"+escaped+"@host")
			if err != nil || c.Password != password || c.Addrs[0] != "host:6379" {
				t.Errorf("%q as %s: got %+v, error %v; want the password", password, escaped, c, err)
			}
		}
		c, err := parse(t, "redis+sentinel://host?master=m&sentinel_password="+url.QueryEscape(password))
		if err != nil || c.SentinelPassword != password {
			t.Errorf("%q: got %+v, error %v; want the password", password, c, err)
		}
	}
}

// FuzzParse looks for panics, for errors that are not ErrInvalid or show a credential, and for
// configurations that no client could use.
func FuzzParse(f *testing.F) {
	for _, password := range hostile {
		f.Add("redis://u:", password, "@host/0?prefix=x")
		f.Add("redis+sentinel://host?master=m&sentinel_password=", password, "&timeout=x")
	}
	for _, tail := range []string{"@host:0", "@", "@a,b", "@h/x", "@h?timeout=x", "@h?x=1&x=2", "@h#f", "@h?ca=/no", "@[::1]?addr=b:b", "/1?", ":1@h"} {
		f.Add("redis+cluster://u:", "p", tail)
		f.Add("rediss://", "p", tail)
		f.Add("unix://u:", "p", tail)
	}
	f.Fuzz(func(t *testing.T, head, password, tail string) {
		const secret = "correcthorsebattery"
		raw := head + password + secret + tail
		u, err := url.Parse(raw)
		if err != nil {
			return
		}
		c, err := Parse(u)
		if err != nil {
			if !errors.Is(err, quota.ErrInvalid) {
				t.Errorf("%q: got error %v, want ErrInvalid", u, err)
			}
			// A credential is what stands in front of a '@', in an address too, and in the parameters for it.
			credential := strings.LastIndexByte(raw, '@') > strings.Index(raw, secret) || strings.Contains(u.Query().Get("sentinel_password"), secret)
			for _, a := range u.Query()["addr"] {
				i := strings.Index(a, secret)
				credential = credential || i >= 0 && strings.LastIndexByte(a, '@') > i
			}
			if credential && strings.Contains(err.Error(), secret) {
				t.Errorf("%q: got error %v, want no credential in it", u, err)
			}
			return
		}
		if len(c.Addrs) == 0 || c.Timeout < minTimeout || c.DialTimeout < minTimeout || c.DB < 0 || c.Cluster && c.DB > 0 ||
			(c.TLS == nil) != (u.Scheme != "rediss" && u.Query().Get("tls") != "true") || (c.Master != "") != (u.Scheme == "redis+sentinel") || c.Socket != (u.Scheme == "unix") {
			t.Errorf("%q: got %+v, want a configuration that a client can use", u, c)
		}
		for _, a := range c.Addrs {
			if strings.Contains(a, secret) && credentialed(u, secret) {
				t.Errorf("%q: got a credential as the address %s, want none", u, a)
			}
		}
		if again, err := Parse(u); err != nil || fmt.Sprint(again.Addrs, again.Prefix) != fmt.Sprint(c.Addrs, c.Prefix) {
			t.Errorf("%q: got %+v, error %v the second time, want %+v", u, again, err, c)
		}
	})
}

// credentialed reports whether the secret is in the userinfo only.
func credentialed(u *url.URL, secret string) bool {
	return u.User != nil && strings.Contains(u.User.String(), secret) && !strings.Contains(u.Host+u.RawQuery, secret)
}

// The schemes of Valkey read a URL as those of Redis do.
func TestValkey(t *testing.T) {
	for _, rest := range []string{"://u:p@h/3?timeout=1s", "s://u:p@h", "+cluster://h?addr=i&tls=true", "+sentinel://h/2?master=m"} {
		want, err := parse(t, "redis"+rest)
		if err != nil {
			t.Fatal(err)
		}
		got, err := parse(t, "valkey"+rest)
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("valkey%s: got %+v, error %v; want %+v", rest, got, err, want)
		}
	}
	if _, err := parse(t, "valkey://h?ca=x"); err == nil || !strings.Contains(err.Error(), "valkeys://") {
		t.Errorf("ca without TLS: got error %v, want one that names valkeys://", err)
	}
}

// No text tells anything of a credential: it is the same whatever the credential is, though it be a word of the text. And
// the text names the field.
func TestTextsWithoutCredentials(t *testing.T) {
	secrets := []string{"zzzzzzzz", "Z", "zz", "user", "password", "host", "URL", "e", "o", "0", "1", ":", "(not shown)", "accepted", "a", "parameter ",
		"mymaster", "p/q", "r?s", "t#u", "v@w", "x%y", " ", "\"", "é", "\x01", "timeout", "redis"}
	for _, test := range []struct{ url, names string }{
		{"redis://SECRET@host", "the URL has a user and no password"},
		{"redis://SECRET:@host", "the URL has a user and no password"},
		{"redis://:SECRET@host/x!", "the path is"},
		{"redis://u:SECRET@", "the URL has no host"},
		{"redis://u:SECRET@host,two", "the host is"},
		{"redis://SECRET:SECRET@host?timeout=zero!", "parameter timeout is"},
		{"redis://u:SECRET@host?strict=maybe!", "parameter strict is"},
		{"redis://u:SECRET@host?batching=some!", "parameter batching is"},
		{"redis://u:SECRET@host?protocol=4!", "parameter protocol is"},
		{"redis://u:SECRET@host?prefix=%7B", "parameter prefix is"},
		{"redis://u:SECRET@host#f", "the URL has a fragment"},
		{"redis://u:SECRET@host?ca=x", "parameter ca needs TLS"},
		{"rediss://u:SECRET@host?ca=/none!", "parameter ca is"},
		{"rediss://u:SECRET@host?cert=/none!&key=/none!", "parameter cert is"},
		{"redis://u:SECRET@host?password=SECRET", "unknown parameter"},
		{"redis://host?token=SECRET", "unknown parameter"},
		{"redis+sentinel://u:SECRET@host", "parameter master is missing"},
		{"redis+sentinel://host?master=m&sentinel_user=SECRET", "parameter sentinel_user is there without sentinel_password"},
		{"redis+sentinel://host/x!?master=m&sentinel_user=SECRET&sentinel_password=SECRET", "the path is"},
		{"redis+cluster://u:SECRET@host/7!", "the path is"},
		{"unix://u:SECRET@host/s", "the URL has the host"},
	} {
		for _, escape := range []func(string) string{userinfo, url.QueryEscape, everyByte} {
			texts := map[bool]string{}
			for _, secret := range secrets {
				u, err := url.Parse(strings.ReplaceAll(test.url, "SECRET", escape(secret)))
				if err != nil {
					t.Fatal(err)
				}
				_, err = Parse(u)
				if !errors.Is(err, quota.ErrInvalid) || !strings.Contains(err.Error(), test.names) {
					t.Fatalf("Parse(%q): got error %v, want ErrInvalid that says %q", u, err, test.names)
				}
				// A value that holds the credential too is not shown. Every text is one of these two.
				shown := !strings.Contains(err.Error(), "(not shown)")
				if texts[shown] == "" {
					texts[shown] = err.Error()
				}
				if texts[shown] != err.Error() {
					t.Errorf("Parse(%q): got %q, want the text of every credential, %q", u, err, texts[shown])
				}
				if r, is := err.(interface{ Redacted() bool }); !is || !r.Redacted() {
					t.Errorf("Parse(%q): got an error of type %T, want one that is Redacted", u, err)
				}
			}
		}
	}
}

// everyByte escapes every byte of a text.
func everyByte(s string) (escaped string) {
	for i := range len(s) {
		escaped += fmt.Sprintf("%%%02x", s[i])
	}
	return escaped
}

func userinfo(s string) string { return url.User(s).String() }
