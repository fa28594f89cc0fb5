"""The two shader programs of the renderer: skin, cloth, hair and eyes in four materials, one key
light and a fill."""

VERTEX = """#version 330
in vec3 position; in vec3 normal; in vec2 uv;
uniform mat4 projection; uniform mat3 rotation;
out vec3 N; out vec2 T; out vec3 W; out vec3 O;
void main() {
    gl_Position = projection * vec4(position, 1.);
    N = rotation * normal; T = uv; W = rotation * position; O = position;
}"""

# `part`: 0 skin, 1 hair (brows, lashes), 2 eyes, 3 cloth. `material`: 0 natural, 1 bark, 2 marble,
# 3 bronze.
FRAGMENT = """#version 330
in vec3 N; in vec2 T; in vec3 W; in vec3 O;
out vec4 colour;
uniform sampler2D image; uniform vec3 tint; uniform int part; uniform int material;
uniform vec3 key_direction; uniform vec3 key; uniform vec3 fill; uniform vec3 ambient;
uniform float gloss; uniform vec3 camera; uniform vec3 alpha_range; uniform vec4 paint;
uniform vec3 eye; uniform float jacket;

float hash(vec3 p) { return fract(sin(dot(p, vec3(12.9898, 78.233, 45.164))) * 43758.5453); }
float noise(vec3 p) {
    vec3 i = floor(p), f = fract(p);
    f = f * f * (3. - 2. * f);
    float sum = 0.;
    for (int k = 0; k < 8; k++) {
        vec3 c = vec3(k & 1, (k >> 1) & 1, (k >> 2) & 1);
        vec3 w = mix(1. - f, f, c);
        sum += w.x * w.y * w.z * hash(i + c);
    }
    return sum;
}
float fractal(vec3 p) {
    float a = .5, sum = 0.;
    for (int k = 0; k < 4; k++) { sum += a * noise(p); p = p * 2.03 + 7.; a *= .5; }
    return sum;
}

void main() {
    vec4 texel = texture(image, T);
    vec3 n = normalize(N);
    if (!gl_FrontFacing) n = -n;
    float shine = gloss, opacity = 1.;
    float grey = dot(texel.rgb, vec3(.33));
    vec3 base = texel.rgb * tint;
    if (part == 1) {
        if (texel.a < alpha_range.x || texel.a > alpha_range.y) discard;
        if (alpha_range.z > 0.) opacity = texel.a;
        base = tint * (.35 + 1.5 * dot(texel.rgb, vec3(.3, .6, .1)));
    } else if (part == 3) {
        base = tint;
        if (jacket > 0.) {  // a dark jacket opening on a pale shirt in a V under the chin
            float v = abs(O.x) - .55 * (O.y - eye.y + 2.15);
            base = v < 0. ? vec3(.88) : (v < .07 ? tint * .45 : tint * .8);
        }
    }
    if (part == 0 && paint.a > 0.) {  // a band of stage paint across the eyes, ragged at its edges
        float edge = abs(O.y - eye.y - .02) + .10 * (noise(O * 6.) - .5);
        base = mix(base, paint.rgb, paint.a * smoothstep(.24, .17, edge) * step(abs(O.x), 1.1));
    }
    if (material == 1 && part != 2) {
        float ridge = fractal(vec3(O.x * 7., O.y * 2.2, O.z * 7.) * 1.3);
        float groove = smoothstep(.03, .20, abs(ridge - .5) * 2.);
        vec3 wood = mix(vec3(.30, .20, .12), vec3(.52, .39, .26), fractal(O * 9.));
        float keep = part == 0 ? grey : .35;  // the skin's own shading stays, so that features do
        base = mix(wood * .55, wood, groove) * (.35 + 1.15 * keep);
        vec3 bump = vec3(fractal(O * 6. + 3.), fractal(O * 6. + 11.), fractal(O * 6. + 19.)) - .47;
        n = normalize(n + .56 * bump);
        shine *= .1;
    } else if (material == 2) {
        base = vec3(.86, .84, .80) * (part == 2 ? .8 : 1.) * (part == 1 ? .92 : 1.);
        shine = .25;
    } else if (material == 3) {
        base = vec3(.62, .38, .16) * (part == 2 ? .75 : 1.);
        shine = 1.4;
    }
    float wrap = part == 0 ? .35 : .15;
    float diffuse = max(0., (dot(n, key_direction) + wrap) / (1. + wrap));
    vec3 view = normalize(camera - W);
    float tightness = part == 2 ? 90. : (material == 3 ? 24. : 18.);
    float highlight = pow(max(0., dot(n, normalize(view + key_direction))), tightness);
    float rim = pow(1. - max(0., dot(n, view)), 3.);
    vec3 fill_direction = normalize(vec3(-key_direction.x, .1, .6));
    vec3 light = ambient * (.75 + .25 * n.y) + key * diffuse + fill * max(0., dot(n,
    fill_direction));
    if (part == 0 && material == 0)  // light that scatters in skin comes out red in the shade
        light *= mix(vec3(1.12, .96, .92), vec3(1.), smoothstep(0., .5, diffuse));
    vec3 lit = base * light + vec3(highlight) * shine * key + rim * .12 * key + rim * .5 * fill;
    colour = vec4(pow(clamp(lit, 0., 1.), vec3(.87)), opacity);
}"""
