package engine

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"

	"github.com/fleetquota/fleetquota/quota"
)

// A server other than Redis may run the scripts and compute something else in silence: one packs a number of 7 bytes
// wrongly, so that a state of 1 token is read as one of 16777216. So a script of one key, which reads only, asks each
// node for the functions that the scripts use, at the numbers where they differ, before the first decision there.

// A check is an expression of Lua and its value, an int64 or a string. name is the function that is wrong if the server
// returns another value.
type check struct {
	name, lua string
	want      any
}

const (
	largest = quota.MaxNumber - 1 // the largest number that a state may hold
	mixed   = 0x01020304050607    // a number whose bytes differ
)

// checks are all that a server must compute. The values of the arguments stand in probeArgs.
var checks = []check{
	{"numbers in arguments", "m", int64(largest)},
	{"struct.unpack", "floor(n1)", int64(largest)},
	{"struct.unpack", "floor(n2)", int64(-largest)},
	{"struct.unpack", "floor(n3)", int64(-1<<52 - 1)},
	{"struct.unpack", "floor(n4)", int64(mixed)},
	{"struct.unpack", "floor(n5)", int64(255)},
	{"struct.unpack", "floor(n6)", int64(-1)},
	{"struct.unpack", "floor(n7)", int64(0)},
	{"struct.unpack", "floor(u1)", int64(largest)},
	{"struct.unpack", "floor(u2)", int64(mixed)},
	{"struct.pack", "pack('>I7I7', m, n4)", string(appendNumber(appendNumber(nil, largest), mixed))},
	{"struct.pack", "pack('>I7', 1)", string(appendNumber(nil, 1))},
	{"subtraction", "m - 1", int64(largest - 1)},
	{"multiplication", "floor(67108864 * (n5 + 67108609))", int64(1 << 52)},
	{"math.floor", "floor(n5 / 4)", int64(63)},
	{"math.floor", "floor(m / 2)", int64(largest / 2)},
	{"math.floor", "floor(e + 0.5)", int64(1e15)},
	{"math.ceil", "ceil((n5 + 2) / 4)", int64(65)},
	{"math.ceil", "ceil(m / 2)", int64(largest/2 + 1)},
	{"math.ceil", "ceil(m / 3)", int64(largest/3 + 1)},
	{"math.ceil", "ceil(e + 0.5)", int64(1e15 + 1)},
	{"the operator %", "floor(m % 1000000)", int64(largest % 1000000)},
	{"math.min", "min(m, m - 1)", int64(largest - 1)},
	{"math.max", "max(m, m - 1)", int64(largest)},
	{"struct.pack", "pack('>i7', -m)", string(appendNumber(nil, -largest))},
	// The longest lifetime is written in digits; a server may write a large number with an exponent or a fraction.
	{"the text of a number", "'' .. ceil(m / 1000)", strconv.FormatInt(largest/1000+1, 10)},
	{"string.byte", "byte(A[4], 7)", int64(largest & 255)},
	{"string.sub", "sub(A[4], 8, 14)", string(appendNumber(nil, mixed))},
	{"string.gmatch", "found", strconv.FormatInt(largest, 10)},
	{"GET", "held", int64(1)},
	{"TIME", "digits", int64(1)},
}

const probeText = `local A, byte, gmatch = ARGV, string.byte, string.gmatch
local n1, n2, n3, n4, n5, n6, n7 = unpack(NUMBERS, A[1])
local m, e = A[2] + 0, A[3] + 0
local u1, u2 = unpack('>I7I7', 'xy' .. A[4], 3)
local found
for _, cost in gmatch('1 ' .. A[2], '(%d+) (%d+)') do found = cost end
local v, held, digits = call('GET', KEYS[1]), 0, 0
if v == false or type(v) == 'string' then held = 1 end
local t = call('TIME')
if #t == 2 and #('' .. t[1]) == 10 and t[2] + 0 < 1000000 then digits = 1 end
return {CHECKS}
`

var (
	// probeScript is the text of the script.
	probeScript = sync.OnceValue(func() string {
		s := &scripts{slack: "0"}
		list := make([]string, len(checks))
		for i, c := range checks {
			list[i] = c.lua
		}
		return s.assemble("", strings.Replace(probeText, "CHECKS", strings.Join(list, ",\n"), 1))
	})
	// probeArgs are the arguments behind the key.
	probeArgs = sync.OnceValue(func() []any {
		var packed []byte
		for _, n := range []int64{largest, -largest, -1<<52 - 1, mixed, 255, -1, 0} {
			packed = appendNumber(packed, n)
		}
		return []any{string(packed), strconv.FormatInt(largest, 10), "1000000000000000", string(appendNumber(appendNumber(nil, largest), mixed))}
	})
)

// wrongServer is the error of a server that computes something else than the scripts need.
type wrongServer struct{ error }

func (e *wrongServer) Unwrap() error { return e.error }

// probe asks the node that has a key whether it computes as the scripts need it. It needs no right that decisions do
// not. If the node does not, the error is a wrongServer; any other error leaves the question open, and is not yet that
// of a script which only reads, see ofRead.
func (s *Store) probe(ctx context.Context, key string) error {
	r, err := s.client.Do(ctx, append([]any{eval, probeScript(), small[1], key}, probeArgs()...), 1)
	switch {
	case err != nil && IsNoScript(err): // in answer to a script's text: of a proxy
		return ReplyError(err)
	case err != nil:
		return err
	case r.Len() != len(checks):
		return badReply(r)
	}
	for i := range checks {
		c := &checks[i]
		var got any
		var ok bool
		if _, number := c.want.(int64); number {
			got, ok = r.Int(i)
		} else {
			got, ok = r.Text(i)
		}
		if !ok || got != c.want {
			return s.wrong(ctx, c, got, ok)
		}
	}
	return nil
}

// wrong is the error of a check that failed.
func (s *Store) wrong(ctx context.Context, c *check, got any, ofKind bool) error {
	server := "the server"
	if infos, err := s.client.Info(ctx); err == nil && len(infos) > 0 {
		if kind, version := software(infos[0]); kind != "" {
			server += ", " + kind + " " + version + ","
		}
	}
	value := "a value of another kind"
	if ofKind {
		value = fmt.Sprintf("%#v", got)
	}
	return &wrongServer{fmt.Errorf("redis: %w: %s has a wrong %s in its Lua: %s is %s and must be %#v; nothing was charged; accepted: a server that computes as Redis does",
		quota.ErrMisconfigured, server, c.name, c.lua, value, c.want)}
}

// probed asks the node of a call that is about to be sent there, unless it has answered before. When the node became
// ready, it refused the question, which may have been because of the key.
func (s *Store) probed(ctx context.Context, r *readiness, c *connections, key string) error {
	if r.probed.Load() {
		return nil
	}
	if err := s.probe(ctx, key); err != nil {
		s.failed(r, c, key, err)
		return ofRead(err)
	}
	r.probed.Store(true)
	return nil
}

// probeNodes asks all nodes that were in use, or the server if none was.
func (s *Store) probeNodes(ctx context.Context) error {
	var keys []string
	add := func(r *readiness) {
		r.mu.Lock()
		defer r.mu.Unlock()
		if r.key != "" {
			keys = append(keys, r.key)
		}
	}
	for _, r := range *s.named.Load() {
		add(r)
	}
	if add(&s.unnamed); len(keys) == 0 {
		keys = []string{s.o.Prefix + "{health}"}
	}
	for _, key := range keys {
		// A user who is there to look after the server may have no right to scripts.
		if err := s.probe(ctx, key); err != nil && (isWrongServer(err) || !ofSomeKeys(err) && !errors.Is(err, quota.ErrMisconfigured)) {
			return ofRead(err)
		}
	}
	return nil
}

// isWrongServer reports whether an error is that of a server that computes something else than the scripts need.
func isWrongServer(err error) bool {
	_, is := errors.AsType[*wrongServer](err)
	return is
}

// Probe answers a command as a right server does, if it is the question of a store for the server's functions: for
// servers that tests make. The reply is the elements of an array.
func Probe(args []string) (reply []any, is bool) {
	if len(args) < 2 || args[1] != probeScript() {
		return nil, false
	}
	for _, c := range checks {
		reply = append(reply, c.want)
	}
	return reply, true
}
