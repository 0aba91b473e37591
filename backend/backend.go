// Package backend chooses the store of limits at run time, by a URL or by the environment.
//
//	store, err := backend.Open(ctx, "memory://?max_keys=100000")
//	if err != nil {
//		return err
//	}
//	limiter, err := quota.NewLimiter(store, limit, nil)
//	if err != nil {
//		return err
//	}
//	defer limiter.Close()
//	d, err := limiter.Take(ctx, "team-7/agent-123", 250)
//
// The first segment of a key, here team-7, is the hash tag of a Redis Cluster: all keys with that segment are
// in one slot, on one node.
//
// The scheme of the URL names the driver that opens the store. A program links only the drivers that it
// imports, as with database/sql:
//
//	import _ "github.com/fleetquota/fleetquota/backend/goredis"
//
//	scheme                                              driver
//	memory                                              always there: package backend/local
//	redis, rediss, redis+sentinel, redis+cluster        backend/goredis or backend/rueidis
//	valkey, valkeys, valkey+sentinel, valkey+cluster    the same
//	unix                                                the same: a server's Unix socket
//	postgres, postgresql                                backend/postgres, a module of its own
//
// Where several linked drivers have registered a scheme, the parameter client names one of them, as in
// "redis://host:6379?client=rueidis". Without that parameter Open prefers goredis, and for a cluster
// rueidis.
//
// # Errors
//
// A URL or parameter that Open refuses is [quota.ErrInvalid]; an error of a driver is wrapped. No error holds a
// credential of the URL: Open withholds a driver's message that has one.
//
// # Concurrency
//
// All functions may be called concurrently.
package backend

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// An OpenFunc opens the store that a URL describes. The URL has a scheme that the driver registered, and no
// parameter client. The function must refuse unknown parameters with [quota.ErrInvalid], must return a store
// or an error, and may be called concurrently. The caller of Open closes the store.
//
// Open masks the credentials of the URL in the error's text, wherever they occur by chance. A driver whose text holds no
// part of the credentials returns an error with the method Redacted() bool that reports true, and keeps its text.
type OpenFunc func(ctx context.Context, u *url.URL) (quota.Store, error)

// importPath with the name of a driver of this module is the path of its package.
const importPath = "github.com/fleetquota/fleetquota/backend/"

// known are the drivers of this module that a program may import, by scheme, the preferred one first.
var known = map[string][]string{
	"redis":           {"goredis", "rueidis"},
	"rediss":          {"goredis", "rueidis"},
	"redis+sentinel":  {"goredis", "rueidis"},
	"redis+cluster":   {"rueidis", "goredis"},
	"valkey":          {"goredis", "rueidis"},
	"valkeys":         {"goredis", "rueidis"},
	"valkey+sentinel": {"goredis", "rueidis"},
	"valkey+cluster":  {"rueidis", "goredis"},
	"unix":            {"goredis", "rueidis"},
	"postgres":        {"postgres"},
	"postgresql":      {"postgres"},
}

var (
	mu      sync.RWMutex // guards drivers
	drivers = map[string]opener{"memory": {[]string{"memory"}, openMemory}}
)

type opener struct {
	schemes []string
	open    OpenFunc
}

// Register makes a driver known under a name, for some URL schemes; a driver's package calls it from init.
// Several drivers may share a scheme. Names and schemes must begin with a lower-case letter, and may have
// lower-case letters, digits, '+', '-' and '.'. Register panics on any other name or scheme, without a
// scheme, on a nil open, and on a name that is registered already.
func Register(name string, schemes []string, open OpenFunc) {
	switch {
	case !validScheme(name):
		panic(fmt.Sprintf("backend: Register of driver %q: accepted: a lower-case name such as goredis", name))
	case len(schemes) == 0:
		panic("backend: Register of driver " + name + " without a scheme")
	case open == nil:
		panic("backend: Register of driver " + name + " with a nil OpenFunc")
	}
	for _, s := range schemes {
		if !validScheme(s) {
			panic(fmt.Sprintf("backend: Register of driver %s for scheme %q: accepted: a lower-case scheme such as redis", name, s))
		}
	}
	mu.Lock()
	defer mu.Unlock()
	if _, twice := drivers[name]; twice {
		panic("backend: Register called twice for driver " + name)
	}
	drivers[name] = opener{slices.Clone(schemes), open}
}

// Schemes returns the schemes of the linked drivers, sorted and without duplicates.
func Schemes() []string {
	var all []string
	for _, d := range linked() {
		all = append(all, d.schemes...)
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// linked returns the drivers of this program, by name.
func linked() map[string]opener {
	mu.RLock()
	defer mu.RUnlock()
	return maps.Clone(drivers)
}

// Open opens the store that a URL describes; the package documentation lists the schemes. The caller must
// close the store.
//
// memory:// opens a new, empty store in this process each time. Its parameters max_keys and max_ids bound the keys that
// the store holds, and the request ids that it remembers, each from 1 to 2147483647; without them local.DefaultMaxKeys
// and local.DefaultMaxIDs hold.
//
// Open returns the context's own error where ctx has ended, [quota.ErrInvalid] where it refuses the URL, and
// [quota.ErrMisconfigured] where the driver returns no store. It wraps an error of the driver.
func Open(ctx context.Context, rawURL string) (quota.Store, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	u, err := parse(rawURL)
	if err != nil {
		return nil, err
	}
	scheme := u.Scheme
	client, err := takeClient(u)
	if err != nil {
		return nil, err
	}
	open, err := pick(scheme, client)
	if err != nil {
		return nil, err
	}
	store, err := open(ctx, u)
	switch {
	case err != nil:
		return nil, redact(err, scheme, rawURL, u)
	case store == nil:
		return nil, fmt.Errorf("backend: %w: the driver of %s:// returned no store", quota.ErrMisconfigured, scheme)
	}
	return store, nil
}

// parse reads a URL whose scheme a driver has registered or could register. Its errors, unlike those of
// url.Parse, hold no part of the URL that could belong to credentials.
func parse(rawURL string) (*url.URL, error) {
	scheme, rest, ok := strings.Cut(rawURL, "://")
	scheme = strings.ToLower(scheme)
	switch {
	case !ok || !validScheme(scheme):
		return nil, invalid("the URL does not begin with a scheme; accepted: %s", accepted())
	case !slices.Contains(Schemes(), scheme) && known[scheme] == nil:
		name := bounded(scheme)
		if strings.Contains(rest, "@") {
			name = "of the URL" // the text may be a user or password, with which a URL without a scheme begins
		}
		return nil, invalid("no driver for scheme %s; accepted: %s, or import the driver's package", name, accepted())
	}
	end := strings.IndexAny(rest, "/?#")
	if end < 0 {
		end = len(rest)
	}
	u, err := url.Parse(rawURL)
	// A '@' behind the host means that the password has one of / ? #: the parser cut it there, and read a
	// part of it as the host.
	if err != nil || strings.Contains(rest[end:], "@") {
		return nil, invalid("the %s URL cannot be parsed; accepted: scheme://user:password@host:port/path?name=value, "+
			"with the characters / ? # @ %% of a user or password written as %%2F %%3F %%23 %%40 %%25", scheme)
	}
	return u, nil
}

// takeClient removes the parameter client from a URL and returns it.
func takeClient(u *url.URL) (string, error) {
	q, err := url.ParseQuery(u.RawQuery)
	if err != nil {
		return "", invalid("the parameters of the %s URL cannot be parsed; accepted: ?name=value&name=value", u.Scheme)
	}
	values, there := q["client"]
	if !there {
		return "", nil
	}
	if len(values) > 1 {
		return "", invalid("parameter client comes %d times; accepted: once", len(values))
	}
	q.Del("client")
	u.RawQuery = strings.ReplaceAll(q.Encode(), "+", "%20") // which all drivers read as a space
	return values[0], nil
}

// pick returns the driver for a scheme: the driver named client, or else the preferred one.
func pick(scheme, client string) (OpenFunc, error) {
	drivers := linked()
	var names []string
	for name, d := range drivers {
		if slices.Contains(d.schemes, scheme) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	switch {
	case client != "" && slices.Contains(names, client):
		return drivers[client].open, nil
	case client != "" && slices.Contains(known[scheme], client):
		return nil, notLinked(scheme, []string{client})
	case client != "":
		all := append(names, known[scheme]...)
		slices.Sort(all)
		return nil, invalid("parameter client of the %s URL names no driver; accepted: %s", scheme, either(slices.Compact(all)))
	}
	for _, name := range known[scheme] {
		if slices.Contains(names, name) {
			return drivers[name].open, nil
		}
	}
	switch {
	case len(names) == 1:
		return drivers[names[0]].open, nil
	case len(names) > 1:
		return nil, invalid("several drivers open %s://; accepted: parameter client with one of %s", scheme, either(names))
	}
	return nil, notLinked(scheme, known[scheme])
}

func notLinked(scheme string, names []string) error {
	imports := make([]string, len(names))
	for i, name := range names {
		imports[i] = fmt.Sprintf("import _ %q", importPath+name)
	}
	return invalid("no driver for scheme %s is linked into this program; add %s", scheme, either(imports))
}

// accepted lists the schemes of all drivers that are linked or may be imported.
func accepted() string {
	all := Schemes()
	for s := range known {
		all = append(all, s)
	}
	slices.Sort(all)
	all = slices.Compact(all)
	for i := range all {
		all[i] += "://"
	}
	return either(all)
}

// redact wraps a driver's error. Where the error's text holds a secret of the URL, redact masks it, and keeps only the
// error of package quota that it carries.
func redact(err error, scheme, rawURL string, u *url.URL) error {
	if r, ok := err.(interface{ Redacted() bool }); ok && r.Redacted() {
		return fmt.Errorf("backend: open %s: %w", scheme, err)
	}
	text, short := err.Error(), false
	found := slices.DeleteFunc(secrets(rawURL, u), func(s string) bool { return !strings.Contains(text, s) })
	if len(found) == 0 {
		return fmt.Errorf("backend: open %s: %w", scheme, err)
	}
	sentinel := driver.Sentinel(err)
	if sentinel == nil {
		sentinel = contextError(err)
	}
	// Of a short secret the gaps in the words around it would tell.
	const telling = 4
	pairs := make([]string, 0, 2*len(found))
	slices.SortFunc(found, func(a, b string) int { return len(b) - len(a) })
	for _, s := range found {
		short = short || len(s) < telling
		pairs = append(pairs, s, mask)
	}
	text = strings.NewReplacer(pairs...).Replace(text)
	plain, _ := url.PathUnescape(text)
	if short || slices.ContainsFunc(found, func(s string) bool { return strings.Contains(plain, s) }) {
		text = "the driver's message is withheld, it holds credentials"
	}
	return &redacted{fmt.Sprintf("backend: open %s: %v: %s", scheme, sentinel, text), sentinel}
}

// mask stands for a secret in a driver's message.
const mask = "(not shown)"

// redacted is an error without a driver's, whose text holds credentials.
type redacted struct {
	text     string
	sentinel error
}

func (e *redacted) Error() string { return e.text }
func (e *redacted) Unwrap() error { return e.sentinel }

// contextError returns the error of a context that err carries, or else quota.ErrMisconfigured.
func contextError(err error) error {
	for _, ended := range [...]error{context.Canceled, context.DeadlineExceeded} {
		if errors.Is(err, ended) {
			return ended
		}
	}
	return quota.ErrMisconfigured
}

// secrets returns the credentials of a URL in each form in which a message may quote them.
func secrets(rawURL string, u *url.URL) []string {
	var plain, all []string
	if u.User != nil {
		if password, ok := u.User.Password(); ok {
			plain = append(plain, password)
		} else {
			plain = append(plain, u.User.Username()) // a token
		}
		_, rest, _ := strings.Cut(rawURL, "://")
		if end := strings.IndexAny(rest, "/?#"); end >= 0 {
			rest = rest[:end]
		}
		info := rest[:max(strings.LastIndexByte(rest, '@'), 0)]
		if _, password, ok := strings.Cut(info, ":"); ok {
			info = password
		}
		all = append(all, info)
	}
	for name, values := range u.Query() {
		holds := func(word string) bool { return strings.Contains(strings.ToLower(name), word) }
		if slices.ContainsFunc([]string{"pass", "secret", "token", "auth"}, holds) {
			plain = append(plain, values...)
		}
	}
	for _, s := range plain {
		quoted := strconv.Quote(s)
		all = append(all, s, quoted[1:len(quoted)-1], url.QueryEscape(s), url.PathEscape(s), url.User(s).String())
	}
	return slices.DeleteFunc(all, func(s string) bool { return s == "" })
}

func validScheme(s string) bool {
	for i := 0; i < len(s); i++ {
		c := s[i]
		letter := 'a' <= c && c <= 'z'
		if !letter && (i == 0 || !('0' <= c && c <= '9' || c == '+' || c == '-' || c == '.')) {
			return false
		}
	}
	return s != ""
}

// either joins alternatives: "a, b or c".
func either(s []string) string {
	if len(s) < 2 {
		return strings.Join(s, "")
	}
	return strings.Join(s[:len(s)-1], ", ") + " or " + s[len(s)-1]
}

// bounded quotes a value for a message.
func bounded(s string) string {
	const most = 64
	if len(s) > most {
		s = s[:most] + "…"
	}
	return strconv.Quote(s)
}

func invalid(format string, args ...any) error {
	return fmt.Errorf("backend: %w: "+format, append([]any{quota.ErrInvalid}, args...)...)
}
